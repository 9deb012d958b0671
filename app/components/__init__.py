"""Parts that pages share.

`charts` shows a figure; `markup` makes and escapes HTML and Markdown, `stage` that of stories; `choices` reads the
registries; `documents`, `settings` and `uploads` ask the user; `progress` shows a job.
"""
