"""What upstream is: where its code comes from, how it is recognised and proved."""
