"""Expected attention: tokens that the queries to come are expected to attend to."""
