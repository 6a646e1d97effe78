"""Parts of the scripts that train and evaluate the embedded emoji base model."""
