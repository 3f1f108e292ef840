"""The doctor's models and runner, for the commands that need them."""

from tests.doctor.conftest import check, doctor, llamas, own_llamas, saved

__all__ = ["check", "doctor", "llamas", "own_llamas", "saved"]
