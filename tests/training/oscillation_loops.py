"""Oscillations of single values by plain loops over the formulas of the paper: the oracle of the tests."""


class Loop:
    """One weight, by the formulas of Nagel et al."""

    def __init__(self, integer, momentum):
        self.momentum, self.integer, self.mean = momentum, integer, float(integer)
        self.direction, self.frequency, self.frozen = 0, 0.0, False

    def step(self, integer, threshold):
        if not self.frozen:
            change = integer - self.integer
            sign = (change > 0) - (change < 0)
            oscillated = sign != 0 and sign == -self.direction
            if sign:
                self.direction = sign
            self.integer = integer
        else:
            oscillated = False
        self.frequency = self.momentum * oscillated + (1 - self.momentum) * self.frequency
        if not self.frozen and self.frequency > threshold:
            self.frozen, self.integer = True, round(self.mean)
            self.mean = float(self.integer)
        self.mean = self.momentum * self.integer + (1 - self.momentum) * self.mean


def integers(weight, quantizer):
    """The integer of each value by scalar arithmetic; None where a channel has no width of 1 to 4 bits."""
    rows, found = quantizer.layout.rows(weight.detach()), []
    for channel, row in enumerate(rows.tolist()):
        log2_step, zero, bits = (
            float(part[channel] if part.ndim else part)
            for part in (quantizer.log2_step.detach(), quantizer.zero_point.detach(), quantizer.bits.detach())
        )
        step, low, high = 2.0**log2_step, -zero, 2.0**bits - 1 - zero
        offset = low % 1
        chosen = 1 <= bits <= 4
        for value in row:
            level = min(max(round(value / step - offset) + offset, low), high)
            found.append(int(level - offset) if chosen else None)
    return found
