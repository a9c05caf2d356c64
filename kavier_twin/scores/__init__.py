"""Forecasts kept until their time has come, compared with what happened, corrected and served."""
