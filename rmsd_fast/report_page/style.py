"""Colors, style sheet and script of the report page.

Page and pictures use the same palette. Each series color has a contrast of at least 3:1 with its card. Series also
differ by dash or marker, so that readers do not have to distinguish hues.
"""

from __future__ import annotations

import base64
import hashlib

LIGHT = {
    "page": "#f4f5f7",
    "card": "#ffffff",
    "ink": "#1a1f27",
    "muted": "#586271",
    "grid": "#dfe3e8",
    "line": "#c9d0d8",
    "note": "#fff4d6",
    "note_line": "#b07a00",
    "good": "#0a7d5c",
    "bad": "#c03a2b",
    "s1": "#0b6bcb",
    "s2": "#c4500b",
    "s3": "#0a7d5c",
    "s4": "#9a4fb0",
    "s5": "#8a6d00",
    "s6": "#66707d",
    "s7": "#b3245f",
    "s8": "#1f8296",
}
DARK = {
    "page": "#0f1216",
    "card": "#181c22",
    "ink": "#e8ebef",
    "muted": "#a0abb8",
    "grid": "#2c333c",
    "line": "#3b444f",
    "note": "#33290f",
    "note_line": "#e0b040",
    "good": "#3cc79b",
    "bad": "#ff8272",
    "s1": "#5aa9f5",
    "s2": "#f08a4b",
    "s3": "#3cc79b",
    "s4": "#c78be0",
    "s5": "#d9b84a",
    "s6": "#98a4b2",
    "s7": "#f27aa5",
    "s8": "#55c3d6",
}
SERIES_COLORS = 8
# Second, fourth, ... series of a chart are dashed.
_DASHES = {2: "7 3", 4: "2 3", 5: "9 3 2 3", 7: "4 2", 8: "1 3"}


def _svg_rules(color: dict[str, str]) -> str:
    """Return the rules of the drawings, with literal colors, since SVG viewers may not support CSS variables."""
    rules = [
        f".t{{fill:{color['muted']};font:11px system-ui,sans-serif}}",
        f".tb{{fill:{color['ink']};font:600 12px system-ui,sans-serif}}",
        f".th{{fill:{color['ink']};font:600 16px system-ui,sans-serif}}",
        f".g{{stroke:{color['grid']};stroke-width:1;fill:none}}",
        f".a{{stroke:{color['line']};stroke-width:1;fill:none}}",
        f".w{{stroke:{color['bad']};stroke-width:1;stroke-dasharray:5 4;fill:none}}",
        # An outline in the card's color keeps the text legible where a curve crosses it.
        f".wt{{fill:{color['bad']};font:10px system-ui,sans-serif;"
        f"paint-order:stroke;stroke:{color['card']};stroke-width:3px}}",
        f".fl{{stroke:{color['ink']};stroke-width:2;stroke-dasharray:3 2;fill:none}}",
        f".board{{fill:{color['card']};stroke:{color['line']}}}",
    ]
    for i in range(1, SERIES_COLORS + 1):
        hue = color[f"s{i}"]
        dash = f";stroke-dasharray:{_DASHES[i]}" if i in _DASHES else ""
        rules.append(f".l{i}{{stroke:{hue};stroke-width:2;fill:none;stroke-linecap:round;stroke-linejoin:round{dash}}}")
        rules.append(f".r{i}{{stroke:{hue};stroke-width:1;fill:none;opacity:.3;stroke-linecap:round}}")
        rules.append(f".i{i}{{stroke:{hue};stroke-width:2;fill:none}}")
        rules.append(f".f{i}{{fill:{hue};stroke:{color['card']};stroke-width:1}}")
    return "\n".join(rules)


def svg_style() -> str:
    """Return the style sheet of a drawing, light with a dark variant."""
    return f"{_svg_rules(LIGHT)}\n@media (prefers-color-scheme: dark){{\n{_svg_rules(DARK)}\n}}"


def _variables(color: dict[str, str]) -> str:
    return ";".join(f"--{name.replace('_', '-')}:{value}" for name, value in color.items())


_PAGE_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 20px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:8px 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:40px 0 6px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:22px 0 8px}
p{margin:6px 0;max-width:75ch}
a{color:var(--s1)}
.muted{color:var(--muted)}
.up1{background:color-mix(in srgb,var(--good) 12%,transparent)}
.up2{background:color-mix(in srgb,var(--good) 24%,transparent)}
.up3{background:color-mix(in srgb,var(--good) 36%,transparent)}
.up4{background:color-mix(in srgb,var(--good) 48%,transparent)}
.down1{background:color-mix(in srgb,var(--bad) 12%,transparent)}
.down2{background:color-mix(in srgb,var(--bad) 24%,transparent)}
.down3{background:color-mix(in srgb,var(--bad) 36%,transparent)}
.down4{background:color-mix(in srgb,var(--bad) 48%,transparent)}
.small{font-size:.86rem}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:10px 0;font-size:.9rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px}
.note{background:var(--note);border:1px solid var(--note-line);border-left-width:6px;border-radius:8px;
  padding:10px 14px;margin:14px 0}
.note p{max-width:none}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:10px 18px;margin:14px 0}
.facts dt{color:var(--muted);font-size:.8rem}
.facts dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:12px;margin:16px 0}
.tile b{display:block;font-size:1.55rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile .name{color:var(--muted);font-size:.86rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:12px}
figure{margin:0;position:relative;min-width:0}
.charts figure{display:flex;flex-direction:column}
.charts figure>svg{margin-top:auto}
figcaption{font-size:.92rem;font-weight:600;margin-bottom:2px}
figcaption span{display:block;font-weight:400;font-size:.8rem;color:var(--muted)}
svg{display:block;width:100%;height:auto;overflow:visible}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:4px 0;padding:0;font-size:.8rem}
.legend svg{display:inline-block;width:22px;height:10px;vertical-align:middle;margin-right:5px}
.legend b{font-variant-numeric:tabular-nums;font-weight:600}
.warn{color:var(--bad);font-size:.82rem;font-weight:600;margin:4px 0 0}
.hint{color:var(--muted);font-size:.78rem;margin:2px 0 0}
.scroll{overflow-x:auto;max-width:100%;margin:12px 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
thead th{color:var(--muted);font-weight:600}
thead .fold{white-space:normal;vertical-align:bottom}
tr.sum td,tr.sum th{border-top:2px solid var(--line);font-weight:600}
td small{color:var(--muted);display:block}
.up{color:var(--good);font-weight:600}.down{color:var(--bad);font-weight:600}.same{color:var(--muted)}
.split{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:12px;align-items:start;
  margin:12px 0}
.split>figure:only-child{max-width:640px}
.wide{display:block}.narrow{display:none}
.sample{margin:12px 0}
.frames{display:flex;gap:6px;flex-wrap:wrap;margin:8px 0}
.frames figure{width:calc(12.5% - 6px);min-width:90px;max-width:180px}
.frames .shot,.frames .gone{border-radius:6px;border:1px solid var(--line);overflow:hidden}
.frames .shot{position:relative}
.frames img{display:block;width:100%}
.boxes{position:absolute;inset:0;width:100%;height:100%;overflow:hidden;filter:drop-shadow(0 0 1px #000)}
.boxes rect{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
.swatch{display:inline-block;width:12px;height:12px;border:3px solid;vertical-align:-2px;margin-right:5px}
.frames+.legend{margin-bottom:8px}
.times{display:grid;grid-template-columns:fit-content(220px) 1fr fit-content(140px);gap:4px 10px;align-items:center;
  margin:8px 0;max-width:760px;font-size:.78rem;font-variant-numeric:tabular-nums}
.lane{display:contents}
.lane>span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.lane>span:first-child{text-align:right;color:var(--muted)}
.track{position:relative;height:10px;background:var(--grid);border-radius:3px;overflow:hidden}
.track b,.track .span{position:absolute;top:0;bottom:0;border-radius:3px}
.track b{min-width:2px}
.track .span{background:var(--line)}
.axis .track{height:18px;background:none;overflow:visible}
.axis i{position:absolute;transform:translateX(-50%);font-style:normal;color:var(--muted)}
.axis>span{color:var(--muted)}
.frames .gone{padding:20px 12px;color:var(--muted);font-size:.82rem;border-style:dashed;overflow-wrap:anywhere}
.frames figure.lone{width:100%;max-width:420px}
.frames figcaption{font-weight:400;font-size:.76rem;color:var(--muted)}
.badge{display:inline-block;border:1px solid var(--line);border-radius:99px;padding:0 9px;font-size:.8rem;
  color:var(--muted);margin-right:6px}
.options{margin:4px 0;padding-left:20px}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(250px,100%),1fr));gap:10px;margin-top:10px}
.answer{border:1px solid var(--line);border-left:5px solid var(--line);border-radius:8px;padding:8px 10px;min-width:0}
.answer.good{border-left-color:var(--good)}.answer.bad{border-left-color:var(--bad)}
.answer.part{border-left-color:var(--note-line)}
.answer.unused{opacity:.65;border-style:dashed}
.short pre.text{max-height:150px}
h4{font-size:.9rem;margin:14px 0 0}
.alarms{background:var(--card);border-color:var(--bad)}
.alarms h2{border:0;margin:0;padding:0;color:var(--bad)}
.alarms ul{margin:6px 0;padding-left:20px}
.alarms li{margin:8px 0}
.alarms li>b{display:block}.alarms li>b::first-letter{text-transform:uppercase}
.answer header{display:flex;justify-content:space-between;gap:8px;font-size:.86rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:4px 0 0}
pre.text{font:.84rem/1.45 ui-monospace,Menlo,Consolas,monospace;max-height:260px;overflow:auto}
.tag{color:var(--muted)}
summary{cursor:pointer;font-weight:600;padding:4px 0}
#tip{position:fixed;display:none;pointer-events:none;z-index:9;background:var(--ink);color:var(--card);font-size:.8rem;
  padding:5px 9px;border-radius:6px;max-width:260px}
#tip div{white-space:nowrap;font-variant-numeric:tabular-nums}
.cursor{stroke:var(--muted);stroke-width:1;visibility:hidden}
@media (max-width:640px){
main{padding:12px 12px 40px}
.wide{display:none}.narrow{display:block}
.card{padding:10px}
.frames figure{width:calc(25% - 5px);min-width:0}
.frames figure.lone{width:100%}
.times{grid-template-columns:fit-content(110px) 1fr fit-content(100px)}
th,td{padding:4px 6px}
}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""

SCRIPT = """
(function(){
var tip=document.createElement('div');tip.id='tip';document.body.appendChild(tip);
function show(v){return v===null||v===undefined?'not finite':String(v);}
document.querySelectorAll('svg[data-plot]').forEach(function(svg){
  var plot=JSON.parse(svg.getAttribute('data-plot')),cursor=svg.querySelector('.cursor');
  function hide(){tip.style.display='none';cursor.style.visibility='hidden';}
  svg.addEventListener('pointermove',function(e){
    var box=svg.getBoundingClientRect(),scale=plot.width/box.width,px=(e.clientX-box.left)*scale;
    var want=plot.x0+(px-plot.left)/plot.span*(plot.x1-plot.x0),best=0;
    for(var i=1;i<plot.x.length;i++)if(Math.abs(plot.x[i]-want)<Math.abs(plot.x[best]-want))best=i;
    var x=plot.x1>plot.x0?plot.left+(plot.x[best]-plot.x0)/(plot.x1-plot.x0)*plot.span:plot.left+plot.span/2;
    cursor.setAttribute('x1',x);cursor.setAttribute('x2',x);cursor.style.visibility='visible';
    tip.textContent='';
    [[plot.xName,plot.x[best]]].concat(plot.y.map(function(s){return [s.name,show(s.v[best])];})).forEach(function(p){
      var d=document.createElement('div');d.textContent=p[0]+' '+p[1];tip.appendChild(d);});
    tip.style.display='block';
    var w=tip.offsetWidth,left=e.clientX+14;if(left+w>window.innerWidth-4)left=Math.max(4,e.clientX-w-14);
    tip.style.left=left+'px';tip.style.top=Math.max(4,e.clientY-tip.offsetHeight-10)+'px';
  });
  svg.addEventListener('pointerleave',hide);
});
})();
"""


def _mark_rules() -> str:
    """Return the colors of boxes and bars. Boxes are drawn over video, so they have bright colors in both themes."""
    rules = []
    for name in ("truth", *range(1, SERIES_COLORS + 1)):
        variable, bright = ("good", DARK["good"]) if name == "truth" else (f"s{name}", DARK[f"s{name}"])
        rules.append(f".boxes .m-{name}{{stroke:{bright}}}.swatch.m-{name}{{border-color:var(--{variable})}}")
        rules.append(f".track .m-{name}{{background:var(--{variable})}}")
    # The ground truth is the widest line and is drawn first, so all dashes are visible even if the answers agree.
    rules.append(".boxes .m-truth{stroke-width:5}.boxes .m-1{stroke-dasharray:9 5}.boxes .m-2{stroke-dasharray:3 5}")
    return "\n".join(rules)


def page_style() -> str:
    """Return the style sheet of the page, including its drawings."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
        f"@media (prefers-color-scheme: dark){{:root{{{_variables(DARK)}}}}}\n"
        f"{svg_style()}\n{_PAGE_RULES}{_mark_rules()}"
    )


def content_policy() -> str:
    """Return the content security policy of the page: nothing is fetched, and only the page's own script runs.

    Text of teacher and student is escaped. Even if some text were not, browsers would block any other script.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
