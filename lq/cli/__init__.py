"""The command ``lq``, and the LightningModule and data modules that it brings.

``lq --help`` lists what it does. Modules of this package may be imported by themselves: `lq.cli.timm_module` has
``TimmClassifier``, `lq.cli.data` the data modules, `lq.cli.training` the LightningCLI; only these import Lightning.
"""

from lq.cli.command import main as main
