"""Image files to pixels (`decode`) and pixels to the sizes a model takes (`geometry`)."""

from ..extras import require_extra

# every module here needs it: without the extra, importing any of them ends in the line that says so
require_extra("PIL.Image")
