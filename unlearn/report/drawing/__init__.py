"""Charts as inline SVG, with a title on every mark and a sentence for every drawing. No page and no file is known here."""
