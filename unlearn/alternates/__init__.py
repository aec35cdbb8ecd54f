"""The axis "alternates" (what a forget row is answered with instead), and the stage that generates such answers."""
