"""The style sheet of the page: light and dark by what the reader's system prefers, one column on a phone."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1c2430;--muted:#5d6878;--line:#dfe3e9;--a:#2f6fde;--b:#d9730d;--c:#2a8f5b;
--d:#8a4fc4;--e:#c43d57;--bad:#c0392b;--shade:rgba(20,30,50,.22)}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1b2129;--ink:#e6eaf0;--muted:#98a4b5;--line:#323b47;
--a:#6ea8ff;--b:#f3a257;--c:#5fc690;--d:#bd93ea;--e:#f0859a;--bad:#ff8a7a;--shade:rgba(0,0,0,.45)}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:70rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .6rem}
h3{font-size:.95rem;margin:0 0 .5rem;font-weight:600}p{margin:.3rem 0 .7rem}.muted{color:var(--muted)}
nav{margin:.6rem 0 0;display:flex;flex-wrap:wrap;gap:.3rem .9rem;font-size:.9rem}a{color:var(--a);text-decoration:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.8rem,1fr));gap:.7rem;margin-top:1.1rem}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem .9rem}
.tile b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:.85rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:.8rem;margin-bottom:.8rem}
.cards>*{min-width:0}
svg{display:block;width:100%;max-width:34rem;height:auto;font-size:12.5px;margin:0 auto}
svg .tick{fill:var(--muted)}svg .label{fill:var(--muted);text-anchor:middle}
svg .end{text-anchor:end}svg .start{text-anchor:start}svg .middle{text-anchor:middle}
svg .grid{stroke:var(--line);stroke-width:1}svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
rect.a,circle.a{fill:var(--a)}rect.b,circle.b{fill:var(--b)}circle.c{fill:var(--c)}circle.d{fill:var(--d)}
circle.e{fill:var(--e)}.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.c{stroke:var(--c)}.line.d{stroke:var(--d)}
.line.e{stroke:var(--e)}rect.heat{fill:var(--a)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem;color:var(--muted);margin:.4rem 0 0;
justify-content:center;overflow-wrap:anywhere}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:.2em;margin-right:.4em}
i.a{background:var(--a)}i.b{background:var(--b)}i.c{background:var(--c)}i.d{background:var(--d)}i.e{background:var(--e)}
.legend{align-items:center}.legend i.heat{width:8rem;margin:0;background:linear-gradient(to right,transparent,var(--a))}
.scroll{overflow:auto;max-height:32.6rem;border:1px solid var(--line);border-radius:.6rem;background:
linear-gradient(to left,var(--card),transparent) 100% 0/2.4rem 100% no-repeat local,
linear-gradient(to top,var(--card),transparent) 0 100%/100% 2.4rem no-repeat local,
linear-gradient(to left,var(--shade),transparent) 100% 0/1rem 100% no-repeat scroll,
linear-gradient(to top,var(--shade),transparent) 0 100%/100% 1rem no-repeat scroll,var(--card)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.32rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th{position:sticky;top:0;background:var(--card);color:var(--muted);font-weight:600;z-index:1}
tr:last-child td{border-bottom:0}td.n,th.n{text-align:right}
td.wide{white-space:normal;overflow-wrap:anywhere;min-width:14rem}
td.bad{color:var(--bad);font-weight:600}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--a);margin-bottom:.4rem}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.15rem 1rem;margin:0;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}ul{margin:.3rem 0;padding-left:1.2rem}
@media (max-width:32rem){svg{font-size:15.5px}main{padding:1rem .7rem}
h1{font-size:1.35rem}.tile b{font-size:1.2rem}
.tiles{grid-template-columns:repeat(2,1fr)}
th:first-child,td:first-child{position:sticky;left:0;
background:var(--card);z-index:1}th:first-child{z-index:2}td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:9.5rem}
dl{grid-template-columns:minmax(5.5rem,auto) 1fr}}
@media print{.scroll{max-height:none}}
"""
