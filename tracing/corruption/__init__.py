"""The axis "corruption": how the subject is made unreadable."""
