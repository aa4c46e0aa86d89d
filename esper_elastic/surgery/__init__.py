"""Surgery on live models: edits of their structure, trial runs, validators, transactions."""
