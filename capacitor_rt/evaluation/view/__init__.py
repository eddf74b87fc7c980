"""The results page: originals, reconstructions and latents as files that a browser opens from disk, without a network.

`writer` makes the page, `pictures` its images, `latents` its statistics and colours, `folder` decides what may be
overwritten, `site` renders the HTML and the data, `serve` shows it on the loopback interface.
"""
