"""Work on traces and recordings, without a daemon: simulate, compare, backtest, counterfactual."""
