"""Pages, one question each. A page draws what `app.state` says is on screen.

The folder is not called `pages`: Streamlit would take each file in it for a page of its own.
"""
