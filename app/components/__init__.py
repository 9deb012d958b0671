"""Parts that pages share: figures on a page, markup, long jobs."""
