"""Image files to pixels (`decode`) and pixels to the sizes a model takes (`geometry`)."""
