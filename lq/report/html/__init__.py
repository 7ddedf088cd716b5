"""A quantized network on one HTML page that needs nothing but itself, and the same as JSON."""

from lq.report.html.data import History as History
from lq.report.html.data import Report as Report
from lq.report.html.page import render as render
from lq.report.html.page import write_report as write_report
