"""The lab: recordings of what a model did, and what notebooks need around them."""
