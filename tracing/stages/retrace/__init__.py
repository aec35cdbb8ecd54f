"""The stage `retrace`: the facts of an earlier trace once more, in a changed model."""
