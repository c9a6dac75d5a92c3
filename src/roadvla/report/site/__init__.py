"""The page: one HTML file with every table and figure, from result files alone."""

from roadvla.report.site.page import write_page

__all__ = ["write_page"]
