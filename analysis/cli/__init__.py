"""The command line of `analysis`: all that needs no drawing. `analysis.__main__` and `app.cli` make programs of it.

`measures`, `compression`, `evaluation` and `catalogue` hold the commands, one function each. `options` declares what
they take, `output` is how they tell what they found, `program` runs them, with exit statuses.
"""
