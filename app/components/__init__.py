"""Parts that pages share.

`charts` shows a figure; `markup` makes and escapes HTML and Markdown; `choices` reads the registries; `controls`
(compression), `sources` (model and texts) and `uploads` (files) ask the user; `jobs` does long work, and `measured` is
the frame of what such work has measured.
"""
