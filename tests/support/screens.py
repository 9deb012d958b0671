"""A page of the app as Streamlit runs it, without a browser: its header, and the address that it is opened by."""

from streamlit.testing.v1 import AppTest

from app.engine import Engine
from app.jobs import Jobs


def opened(screen, *, model="books-5m", server=None, **params):
    """A page of `app.screens` that draws with (engine, jobs), in a fresh session at an address; it must not raise."""

    def script(screen, engine, jobs):
        from importlib import import_module

        from app import address, header

        page = import_module(f"app.screens.{screen}")  # before the address is read: pages add parameters to it
        address.read(engine)
        header.draw(engine, jobs)
        page.draw(engine, jobs)
        address.write()

    engine = Engine()
    page = AppTest.from_function(script, args=(screen, *(server or (engine, Jobs(engine)))), default_timeout=120)
    for name, value in ({"model": model} | params).items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return page


def unfolded(page, key):
    """A page with the part of that key open, which is not drawn before."""
    page.session_state[key] = True
    return page.run()
