"""The page's style sheet: two colors (the forget side, the retain side) on paper, light and dark.

`LIGHT` and `DARK` are the whole palette; text colors have a contrast of at least 4.5 to every ground they stand on
(a test). No font or image is loaded.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#faf9f5",
    "sheet": "#ffffff",
    "tint": "#f1efe8",
    "cell": "#f0f2f6",
    "rule": "#dcd8cc",
    "ink": "#1c2430",
    "soft": "#57606c",
    "retain": "#2a5090",
    "forget": "#a8431f",
    "retain-tint": "#e6edf8",
    "forget-tint": "#fbe9e1",
}
DARK = {
    "paper": "#14171b",
    "sheet": "#1b1f25",
    "tint": "#252a32",
    "cell": "#262b33",
    "rule": "#363d47",
    "ink": "#e7e9ec",
    "soft": "#a5aeba",
    "retain": "#8fb5f2",
    "forget": "#f2a07f",
    "retain-tint": "#22314a",
    "forget-tint": "#45291f",
}


def _variables(palette: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in palette.items())


_RULES = """
*{box-sizing:border-box}
html{font-size:16px;-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
 font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:break-word}
header,nav,main,footer{max-width:76.5rem;margin:0 auto;padding:0 1.5rem}
h1,h2,h3,.question,.value{font-family:"Iowan Old Style","Palatino Linotype",Palatino,P052,Georgia,"Noto Serif",serif;
 font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:clamp(1.9rem,4.5vw,2.75rem);margin:.35rem 0 .5rem;letter-spacing:-.01em}
h2{font-size:1.55rem;margin:0 0 .9rem}
h3{font-size:1.15rem;margin:1.8rem 0 .25rem}
p{margin:0 0 .9rem;max-width:46rem}
a{color:var(--retain)}
small,caption,figcaption,.note,dt{font-size:.8125rem;color:var(--soft)}
th small{display:block;font-weight:400;line-height:1.35}
.number,.value,svg text,dd{font-variant-numeric:tabular-nums lining-nums}
header{padding-top:2.75rem}
.over{font-size:.875rem;color:var(--soft);margin:0}
.mark{font-weight:650;letter-spacing:.02em;color:var(--ink);margin-right:.6em;padding-right:.7em;
 border-right:1px solid var(--rule)}
.question{font-size:1.2rem;font-weight:400;font-style:italic;color:var(--soft);margin-bottom:1.25rem;max-width:44rem}
.verdict{font-size:1.0625rem;line-height:1.65;max-width:52rem;border-left:3px solid var(--retain);padding-left:1.1rem}
.figures-row{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));margin:1.9rem 0 0;
 border-top:1px solid var(--rule);border-bottom:1px solid var(--rule)}
.figures-row>div{padding:.9rem 1.1rem 1rem 0}
.figures-row dd{margin:0}
.value{font-size:1.9rem;line-height:1.25}
.value.long{font-size:1.25rem;line-height:1.9}
.note{line-height:1.45}.note span{display:block}
nav ol{list-style:none;display:flex;flex-wrap:wrap;gap:.35rem 1.5rem;margin:1rem 0 0;padding:0;font-size:.875rem}
nav a{color:var(--soft);text-decoration:none}
nav a:hover,nav a:focus{color:var(--ink);text-decoration:underline}
main>section{margin-top:3.25rem}
.place{color:var(--soft);font-weight:400;margin-right:.35em}
.finding{font-weight:600}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--sheet);padding:.4rem .8rem}
.forget{color:var(--forget)}.retain{color:var(--retain)}
section.side{color:inherit}
figure{margin:0;background:var(--sheet);border:1px solid var(--rule);border-radius:6px;padding:.85rem 1rem .5rem;min-width:0}
figcaption{display:flex;flex-wrap:wrap;align-items:flex-start;gap:.1rem .7rem;margin-bottom:.5rem;min-height:2.1rem}
figcaption small,figcaption b{line-height:1.4}
figcaption b{color:var(--ink);font-size:.9375rem;min-width:0;overflow-wrap:anywhere}
.figures{display:grid;gap:1rem;margin:1.25rem 0}
.two{grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr))}
.three{grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
svg{display:block;max-width:100%}
svg.chart{width:100%;height:auto}
svg.key{margin-left:auto;overflow:visible;flex:none}
svg.bars{width:7.5rem;min-width:7.5rem;height:1.55rem}
svg text{fill:var(--soft);font-size:11.5px;font-family:inherit}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}
svg text.strong{font-weight:650}
svg text.forget,svg rect.forget,svg circle.forget{fill:var(--forget)}
svg text.retain,svg rect.retain,svg circle.retain{fill:var(--retain)}
.ground{fill:var(--cell)}.plus{fill:var(--retain)}.minus{fill:var(--forget)}.faint{fill-opacity:.4}
rect.mark{fill:var(--ink)}
.outline{fill:none;stroke:var(--ink);stroke-width:1.8}
.tentative{stroke-dasharray:5 4}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.whisker{stroke:var(--ink);stroke-width:1.2}
.absent{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:2 2}
.line{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.line.forget{stroke:var(--forget)}.line.retain{stroke:var(--retain)}.line.soft{stroke:var(--soft)}
table{border-collapse:separate;border-spacing:0;width:100%}
caption{text-align:left;caption-side:top;padding:0 0 .6rem}
.above{font-size:.8125rem;color:var(--soft);max-width:58rem;margin-bottom:.4rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.scroll{position:relative;overflow-x:auto;margin:0 0 1.75rem}
.scroll:focus-visible,pre:focus-visible{outline:2px solid var(--retain);outline-offset:2px}
.scores th,.scores td,.plain th,.plain td{padding:.5rem .5rem;text-align:left;vertical-align:top;font-size:.875rem;
 line-height:1.4}
.scores td,.plain td{white-space:nowrap}
.scores .number,.plain .number{text-align:right}
.scores thead th,.plain thead th{vertical-align:bottom;font-weight:600;color:var(--soft);font-size:.8125rem;padding-bottom:.35rem}
.scores thead tr:last-child th,.scores thead th[rowspan]{border-bottom:1px solid var(--soft)}
.scores thead small{font-size:inherit}
.scores tbody th{font-weight:600;min-width:11rem;max-width:17rem;overflow-wrap:anywhere}
.scores tbody tr+tr>*{border-top:1px solid var(--rule)}
.scores tbody+tbody tr:first-child>*{border-top:1px solid var(--soft)}
.scores tbody:last-child{border-bottom:1px solid var(--soft)}
.scores tr.base>*,.scores tr.twin>*{background:var(--tint)}
.scores tr.planned>th:first-child{box-shadow:inset 3px 0 var(--ink)}
.scores tbody th:first-child,.scores thead tr:first-child th:first-child{padding-left:.7rem}
.scores td.trained{white-space:normal;min-width:6.5rem;max-width:9rem}
.scores b{font-weight:750;color:var(--retain)}
.scores abbr{text-decoration:none;border-bottom:1px dotted currentColor;cursor:help}
.terms .pair{padding-left:1.35rem}
.terms th[scope=colgroup]{border-bottom:1px solid var(--rule)}
.tag{font-size:.6875rem;font-weight:500;letter-spacing:.03em;color:var(--soft);border:1px solid var(--rule);border-radius:3px;
 padding:0 .35em;white-space:nowrap}
.none{color:var(--soft)}
.plain th{font-weight:500;white-space:nowrap}
.plain tbody tr>*{border-top:1px solid var(--rule)}
details{margin:0 0 1rem}
summary{cursor:pointer;color:var(--retain);font-size:.875rem;padding:.2rem 0}
dl{margin:1rem 0}
dd{margin:0}
.meanings{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.8rem 2rem}
.meanings dt{font-weight:600;color:var(--ink)}.meanings dd{font-size:.875rem;color:var(--soft)}
.facts>div{display:grid;grid-template-columns:minmax(7rem,12rem) 1fr;gap:.1rem 1.25rem;padding:.42rem 0;
 border-top:1px solid var(--rule)}
.facts{border-bottom:1px solid var(--rule);font-size:.875rem}
.facts dt{overflow-wrap:anywhere}.facts dd{overflow-wrap:anywhere;max-width:56rem}
.cards{columns:2 28rem;column-gap:1.25rem;margin:1rem 0}
.item{break-inside:avoid;padding-bottom:1.25rem}
.card{background:var(--sheet);border:1px solid var(--rule);border-radius:6px;
 table-layout:fixed;font-size:.875rem;line-height:1.45}
.card tr:last-child td:last-child{border-bottom-right-radius:5px}
.card caption{padding:0 0 .4rem}
.card caption small{display:block}
.card .prompt{display:block;font-size:.9375rem;color:var(--ink);font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
.card .long{font-size:.875rem;font-weight:400;line-height:1.5}
.card th,.card td{text-align:left;vertical-align:top;padding:.36rem .75rem;font-weight:400}
.card th{width:27%;color:var(--soft);overflow-wrap:anywhere;font-size:.8125rem}
.card td.said{overflow-wrap:anywhere;white-space:pre-wrap}
.card td.said[dir]{text-align:start}
.card .found{font-size:.75rem;color:var(--soft);text-align:right}
.card .kind{width:6.6rem}.card .who{width:27%}
.card tr+tr>*{border-top:1px solid var(--rule)}
.card .truth td{font-weight:500;color:var(--ink)}.card .truth th{font-weight:600;color:var(--ink)}
.card .truth+tr>*{border-top-color:var(--soft)}
.forget .match-whole>td{background:var(--forget-tint)}.retain .match-whole>td{background:var(--retain-tint)}
.forget .match-whole>.found{color:var(--forget)}.retain .match-whole>.found{color:var(--retain)}
.match-part>.found{color:var(--ink)}
.card details{margin:0}.card summary{font-size:.75rem}
.caveats{padding-left:1.2rem;max-width:50rem}.caveats li{margin:.45rem 0}
pre{background:var(--sheet);border:1px solid var(--rule);border-radius:6px;padding:.9rem 1.1rem;overflow-x:auto;
 font-size:.8125rem;line-height:1.6;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font-family:inherit}
footer{margin-top:3.5rem;padding-bottom:2.5rem}
footer p{border-top:1px solid var(--rule);padding-top:.9rem;font-size:.8125rem;color:var(--soft);max-width:none}
"""

_NARROW = """
@media (max-width:40rem){
header,nav,main,footer{padding-left:1rem;padding-right:1rem}
header{padding-top:1.75rem}
.figures-row{grid-template-columns:1fr 1fr}
figure{padding:.75rem .7rem .4rem}
.scores tbody th{position:sticky;left:0;z-index:1;background:var(--paper);min-width:9rem;max-width:9rem}
.scores tr.base>th,.scores tr.twin>th{background:var(--tint)}
.facts>div{grid-template-columns:1fr}
svg text{font-size:13.5px}
.card,.card tbody,.card caption{display:block}.card colgroup{display:none}
.card caption{border:0}.card tbody{background:var(--sheet);border:1px solid var(--rule);border-radius:6px;overflow:hidden}
.card{border:0;background:none}
.card tr{display:grid;grid-template-columns:1fr auto;padding:.4rem .7rem}
.card tr+tr{border-top:1px solid var(--rule)}
.card tr.truth+tr{border-top-color:var(--soft)}
.card tr>*{padding:0;border:0!important;background:none!important;width:auto!important}
.card td.said{grid-column:1/-1;grid-row:2}
.forget .match-whole{background:var(--forget-tint)}.retain .match-whole{background:var(--retain-tint)}
}
"""

_PRINT = """
@media print{
@page{margin:14mm}
html{font-size:13px}
body{background:#fff}
nav,.skip{display:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
figure,.card,tr{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible}
.scores th,.scores td{font-size:.75rem;padding:.3rem .22rem}
.terms .pair{padding-left:.45rem}.scores thead th{font-size:.6875rem}.scores abbr{border:0}
.figures-row{grid-template-columns:repeat(5,1fr)}
.two,.three{grid-template-columns:1fr 1fr}
.cards{columns:auto;display:grid;grid-template-columns:1fr 1fr;gap:0 1rem}
.scores tbody th{min-width:6.5rem}
pre{white-space:pre-wrap}
}
"""

CSS = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    f"{_RULES}{_NARROW}{_PRINT}"
)
