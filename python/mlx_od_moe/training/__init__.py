"""From a model and text to trained predictors: collect, train."""
