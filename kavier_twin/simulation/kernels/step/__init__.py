"""One replica's engine steps and the requests in them."""
