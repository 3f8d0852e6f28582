"""Importing all of them: what holds of one model must hold of every architecture in the table."""

from __future__ import annotations

from architectures import ARCHITECTURES, HUGGING


def test_the_table_is_as_long_as_we_say():
    assert len(HUGGING) >= 55
    assert len([n for n in ARCHITECTURES if n not in HUGGING]) == 6
