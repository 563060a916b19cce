/** The report's style and its few lines of script, kept inside every page so that a page needs no other file. */

export const REPORT_STYLE = `
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1b2330;--soft:#596474;--line:#dfe3e9;--accent:#1f5fbf;
--good:#17693c;--good-bg:#e2f3e8;--look:#7a4d00;--look-bg:#fcf0d6;--bad:#a31f2b;--bad-bg:#fce6e7;--plain:#465062;--plain-bg:#e9ecf1;--glass:#eceff3;--heat:.6}
@media (prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2028;--ink:#e6eaf0;--soft:#9aa5b4;--line:#2c3540;--accent:#7db0ff;
--good:#7fd6a2;--good-bg:#173626;--look:#f0c26a;--look-bg:#3a2c10;--bad:#ff9aa2;--bad-bg:#42191d;--plain:#b7c0cd;--plain-bg:#2a323d;--glass:#242b35}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
.run,main,footer{max-width:1440px;margin:0 auto;padding:0 28px}
h1,h2,h3,p,ul,dl,dd,figure{margin:0}
h1{font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;font-weight:650;margin:28px 0 12px}
h3{font-size:15px;font-weight:650;line-height:1.35;overflow-wrap:anywhere}
code{font:.87em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
a{color:var(--accent);text-underline-offset:2px}
.soft{color:var(--soft)}
.hidden,.skip:not(:focus){position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.skip:focus{position:fixed;top:8px;left:8px;background:var(--card);padding:8px 12px;z-index:9}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:4px}
[hidden]{display:none!important}
.run{padding-top:36px}
.title{display:flex;gap:12px;align-items:center;justify-content:space-between}
.run .title{justify-content:flex-start;margin-bottom:4px}
.chip{flex:none;font-size:12.5px;font-weight:600;line-height:1;padding:6px 10px;border-radius:99px}
.good{color:var(--good);background:var(--good-bg)}.look{color:var(--look);background:var(--look-bg)}
.bad{color:var(--bad);background:var(--bad-bg)}.plain{color:var(--plain);background:var(--plain-bg)}
.notice{margin-top:18px;padding:14px 18px;border-radius:10px;background:var(--bad-bg);border-left:4px solid var(--bad);max-width:80ch;overflow-wrap:anywhere}
.notice strong{color:var(--bad)}
.counts{display:flex;flex-wrap:wrap;gap:10px;padding:0;margin-top:18px;list-style:none}
.counts li{padding:9px 14px;border-radius:10px;font-size:14px}
.counts b{font-size:18px;margin-right:3px;font-variant-numeric:tabular-nums}
details{margin-top:18px;border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
summary{padding:11px 0;cursor:pointer;font-weight:600}
details table{width:100%;margin-bottom:14px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:baseline}
th{font-weight:600;color:var(--soft)}
.facts{display:flex;flex-wrap:wrap;gap:8px 28px}
details .facts{padding:2px 0 18px}
dt{font-size:12.5px;color:var(--soft)}
dd{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.toolbar{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:10px 20px;align-items:end;padding:14px 0 12px;background:var(--page);border-bottom:1px solid var(--line)}
.toolbar label span{display:block;font-size:12.5px;color:var(--soft);margin-bottom:3px}
.toolbar .grow{flex:1 1 220px;max-width:420px}
input,select{font:inherit;accent-color:var(--accent)}
input[type=search],select{height:36px;width:100%;padding:0 10px;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:8px}
.toolbar select{max-width:260px}
.toolbar input[type=range]{height:36px;width:150px;display:block}
output{margin-left:auto;line-height:36px;color:var(--soft);font-size:14px}
.pager{display:flex;flex-wrap:wrap;gap:6px;margin:16px 0 0;align-items:center}
.pager a{padding:5px 11px;border:1px solid var(--line);border-radius:8px;background:var(--card);text-decoration:none}
.pager [aria-current]{background:var(--accent);border-color:var(--accent);color:var(--card);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:18px;align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:18px;content-visibility:auto;contain-intrinsic-size:auto 540px;overflow-wrap:anywhere}
.card .title{align-items:flex-start}
.card>.soft{font-size:13px;margin-top:2px}
#problems .card{contain-intrinsic-size:auto 170px}
.reason{margin-top:12px;padding:11px 14px;border-radius:10px;font-size:14px}
.reason p{color:var(--ink)}.reason .soft{font-size:13px;margin-top:5px;color:var(--ink);opacity:.82}
.advice{margin-bottom:14px;font-size:14px}
.advice div{display:flex;gap:10px}
.advice dt{flex:0 0 92px;font-size:inherit}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:22px;margin-top:14px;align-items:start}
@media (min-width:780px){.wide{grid-column:span 2}}
figure{background:var(--glass);border-radius:10px;padding:10px}
.view{position:relative;overflow:hidden;width:min(100%,300px*var(--ratio));aspect-ratio:var(--ratio);margin:0 auto;border-radius:3px;background:var(--card)}
.view img{position:absolute;top:0;left:0;width:100%;height:100%;max-width:none;color:var(--soft);font-size:12px}
.view .heat{opacity:var(--heat)}
figcaption{display:grid;grid-template-columns:1fr 110px;gap:6px 14px;align-items:center;margin-top:10px;font-size:13px}
figcaption .name{font-weight:600}figcaption .soft{font-weight:400}
figcaption input{width:100%;margin:0}
.bar,.ends{grid-column:1/-1}
.bar{height:7px;border-radius:2px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.ends{display:flex;justify-content:space-between;margin-top:-4px;font-size:12px;color:var(--soft);font-variant-numeric:tabular-nums}
.note{margin-top:10px;font-size:13.5px;color:var(--look)}
.answer .facts{margin-top:12px}
.numbers{width:100%;margin-top:8px}
.numbers tbody th{border:0;padding-bottom:0}
.numbers td,.numbers thead th{text-align:right;padding-right:0;padding-left:8px;white-space:nowrap;font-variant-numeric:tabular-nums}
.numbers tbody th{color:var(--ink);font-weight:400;overflow-wrap:anywhere}
.numbers tbody tr:last-child>*{border-bottom:0}
.links{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:10px;font-size:13.5px}
.empty{padding:56px 0;text-align:center;color:var(--soft)}
footer{padding-top:32px;padding-bottom:40px;font-size:13px;color:var(--soft)}
@media (max-width:640px){.run,main,footer{padding-left:16px;padding-right:16px}.toolbar{position:static}.toolbar output{margin-left:0}}
@media print{:root{color-scheme:light}body{background:#fff;font-size:12px}.toolbar,.pager,.links,.own,.skip{display:none}.card{break-inside:avoid;content-visibility:visible}.cards{grid-template-columns:repeat(2,1fr)}.chip,.counts li,.reason,.notice{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
`;

export const REPORT_SCRIPT = `
(() => {
  const byId = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll('.card')].map((node) => ({
    node, words: node.textContent.toLowerCase(), data: node.dataset, values: JSON.parse(node.dataset.values),
  }));
  if (cards.length === 0) return;
  const [find, state, sort, heat, shown] = ['find', 'state', 'sort', 'heat', 'shown'].map(byId);
  const total = shown.textContent;

  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    let visible = 0;
    for (const { node, words, data } of cards) {
      node.hidden = !words.includes(wanted) || (state.value !== '' && data.state !== state.value);
      if (!node.hidden) visible += 1;
    }
    for (const section of document.querySelectorAll('main section')) {
      section.hidden = !section.querySelector('.card:not([hidden])');
    }
    byId('none').hidden = visible > 0;
    shown.textContent = visible === cards.length ? total : visible + ' of ' + total;
  };

  const order = () => {
    const by = sort.value;
    const value = ({ data, values }) =>
      by.startsWith('output:') ? (values[by.slice(7)] ?? -Infinity) : Number(data[by]);
    const compare =
      by === 'id' ? (a, b) => a.data.id.localeCompare(b.data.id)
      : by === 'line' ? (a, b) => value(a) - value(b)
      : (a, b) => (value(b) === value(a) ? a.data.line - b.data.line : value(b) > value(a) ? 1 : -1);
    for (const { node } of [...cards].sort(compare)) node.parentNode.append(node);
  };

  find.addEventListener('input', filter);
  state.addEventListener('change', filter);
  sort.addEventListener('change', order);
  heat.addEventListener('input', () => {
    document.documentElement.style.setProperty('--heat', heat.value / 100);
    for (const own of document.querySelectorAll('.own')) {
      own.value = heat.value;
      own.closest('figure').style.removeProperty('--heat');
    }
  });
  document.addEventListener('input', ({ target }) => {
    if (target.classList.contains('own')) target.closest('figure').style.setProperty('--heat', target.value / 100);
  });
  addEventListener('submit', (event) => event.preventDefault());
  filter();
})();
`;
