from __future__ import annotations


def test_a_cancel(control, client):
    control.place("a")
    assert client.cancel("a").status == 200
