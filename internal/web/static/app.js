// The page prints what api/v1 says and adds nothing of its own. Whatever comes
// from a rule is text: it goes into the document as text nodes only.

const pageSize = 200; // Services shown before "show more"
const manyFindings = 30; // shown before "show more"
const manyEndpoints = 12; // of a route, shown before "show all"
const pollEvery = 10_000; // ms: events tell of changes, polling of the time of the last reading
const evenWithin = 1e-9; // shares that differ by less are the kernel's rounding

const $ = (id) => document.getElementById(id);

// el makes an element. Properties beginning with "on" are listeners, others
// attributes; children are elements or text.
function el(tag, props = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (v === undefined || v === false || v === null) continue;
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.filter((c) => c !== undefined && c !== null && c !== false));
  return e;
}

const plural = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

// percent never rounds something to nothing, nor nearly all to all.
function percent(share) {
  const p = 100 * share;
  if (p === 0 || p === 100) return `${p} %`;
  if (p < 0.01) return "< 0.01 %";
  if (p >= 99.95) return "> 99.9 %";
  const text = p < 10 ? p.toFixed(2) : p.toFixed(1);
  return `${text.endsWith(".0") || text.endsWith(".00") ? text.split(".")[0] : text} %`;
}

const shareText = (e) => (e.maxShare === undefined ? percent(e.share) : `${percent(e.share).replace(" %", "")} to ${percent(e.maxShare)}`);

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172_800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86_400)} days`;
}

// clock tells the time, and the day where that is not plain.
function clock(t) {
  const d = new Date(t);
  const time = d.toLocaleTimeString("en-GB");
  return d.toDateString() === new Date().toDateString() ? time : `${d.toLocaleDateString("en-CA")} ${time}`;
}

const hostPort = (address, port) => (address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`);
const serviceName = (s) => (s.namespace ? `${s.namespace}/${s.name}` : s.name) + (s.port ? `:${s.port}` : "");
const serviceKey = (s) => `${serviceName(s)} ${s.protocol}`;

// ---- The agent ----

let skew = 0; // ms that the agent's clock is ahead of the browser's
let offline = ""; // why the last request got no answer

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function get(path) {
  let answer;
  try {
    answer = await fetch(path, { headers: { Accept: "application/json" } });
  } catch {
    throw new Refused(0, "the agent cannot be reached");
  }
  const date = Date.parse(answer.headers.get("Date") ?? "");
  if (date) skew = date - Date.now();
  const doc = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, doc.error?.message ?? `the agent answered ${answer.status}`);
  return doc;
}

// ---- State: what the agent said last, and what the URL asks for ----

let header = null;
let services = []; // with their texts for the filter
let findings = [];
let shown = pageSize;
let asked = { q: "", trace: "", from: "pod" };

function readHash() {
  const p = new URLSearchParams(location.hash.slice(1));
  return { q: p.get("q") ?? "", trace: p.get("trace") ?? "", from: p.get("from") || "pod", to: p.get("endpoint") ?? "" };
}

function hashOf(want) {
  const p = new URLSearchParams();
  if (want.q) p.set("q", want.q);
  if (want.trace) {
    p.set("trace", want.trace);
    p.set("from", want.from);
    if (want.to) p.set("endpoint", want.to);
  }
  // Slashes and colons are fine in a fragment, and easier to read as they are.
  return "#" + p.toString().replaceAll("%2F", "/").replaceAll("%3A", ":").replaceAll("%5B", "[").replaceAll("%5D", "]");
}

// go makes a step that the browser's back button undoes.
function go(change) {
  const hash = hashOf({ ...asked, ...change });
  if (hash === (location.hash || "#")) apply();
  else location.hash = hash;
}

function apply() {
  const before = asked;
  asked = readHash();
  if ($("filter").value !== asked.q) $("filter").value = asked.q;
  if (before.q !== asked.q) {
    shown = pageSize;
    showAll();
  }
  showTrace();
}

// ---- Loading ----

let asks = 0;
let answered = 0; // the latest request whose answer is shown
let servicesHeader = null; // of the answer that services is from

async function load(everything) {
  const mine = ++asks;
  try {
    const [found, doc] = await Promise.all([get("api/v1/findings"), everything ? get("api/v1/services") : null]);
    if (mine < answered) return; // overtaken
    answered = mine;
    offline = "";
    header = found.snapshot;
    findings = found.findings;
    if (doc) {
      services = doc.services.map((s) => {
        const verdict = worstEcho(s.observed?.echo ?? []);
        return { ...s, echo: verdict, text: searchText(s), print: JSON.stringify([{ ...s, observed: undefined }, verdict]), seen: JSON.stringify({ ...s.observed, echo: undefined }) };
      });
      servicesHeader = doc.snapshot;
    }
    showAll();
  } catch (e) {
    offline = e.message;
  }
  showHeader();
}

function searchText(s) {
  const words = [serviceName(s), s.protocol, s.sessionAffinity ? "affinity" : ""];
  for (const f of s.frontends) {
    words.push(f.type, f.address ? hostPort(f.address, f.port) : `:${f.port}`);
    for (const r of f.routes) {
      words.push(r.verdict, verdicts[r.verdict]?.word ?? "", ...r.endpoints.map((e) => e.address));
    }
  }
  for (const f of s.findings) words.push(f.code, f.severity);
  return words.join(" ").toLowerCase();
}

// listen hears of every change at once. When the stream cannot be had, all is
// asked for again and again.
let live = false;

function listen() {
  const stream = new EventSource("api/v1/events");
  stream.addEventListener("snapshot", () => load(true));
  stream.onopen = () => setLive(true);
  stream.onerror = () => {
    setLive(false);
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, pollEvery);
  };
}

function setLive(now) {
  live = now;
  showHeader();
}

// ---- Header and alerts ----

let loadedNode = null;

function showHeader() {
  const link = offline ? "no answer" : live ? "live" : `every ${pollEvery / 1000} s`;
  if ($("link").textContent !== link) $("link").textContent = link;
  $("link").className = offline ? "error" : live ? "ok" : "";
  const alerts = [];
  if (offline && header) {
    alerts.push(["error", "No answer.", `${sentence(offline)} What you see was read at ${clock(header.time)}.`]);
  } else if (offline) {
    alerts.push(["error", "Nothing to show yet.", sentence(offline)]);
  } else if (header?.stale) {
    alerts.push(["error", "Stale.", `The rules cannot be read any more. What you see was read at ${clock(header.time)}. Reason: ${header.error ?? "unknown"}`]);
  }
  if (header?.torn) alerts.push(["warning", "Torn.", "The rules kept changing while they were read, so some of what follows may be of two moments."]);
  const api = header?.api;
  if (api?.error && api.compared) {
    alerts.push(["warning", "The API is out of reach.", `The rules are compared with what it wanted at ${clock(api.asOf)}; what differs since is not counted. Reason: ${api.error}`]);
  } else if (api?.error) {
    alerts.push(["warning", "Not compared with the API.", sentence(api.error)]);
  }
  showAlerts(alerts);
  if (!header) return;
  $("node").textContent = header.node || "not named";
  $("backend").textContent = header.backend;
  $("time").textContent = clock(header.time);
  $("time").dateTime = header.time;
  $("age").textContent = `${duration(ageOf(header))} ago`;
  $("age").parentElement.className = header.stale || offline ? "error" : "";
  if (loadedNode !== header.node) {
    loadedNode = header.node;
    document.title = header.node ? `${header.node} – natlens` : "natlens";
  }
}

const ageOf = (h) => (Date.now() + skew - Date.parse(h.time)) / 1000;

const sentence = (s) => s[0].toUpperCase() + s.slice(1) + (s.endsWith(".") ? "" : ".");

// showAlerts leaves an alert that stays alone: a screen reader would read it
// out once more.
function showAlerts(alerts) {
  const print = JSON.stringify(alerts);
  if ($("alerts").dataset.print === print) return;
  $("alerts").dataset.print = print;
  $("alerts").replaceChildren(...alerts.map(([level, title, text]) => el("p", { class: `alert ${level}` }, el("strong", {}, title), " ", text)));
}

// ---- Filter ----

function wanted(text) {
  const words = asked.q.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((w) => text.includes(w));
}

function showAll() {
  if (!header) return;
  const list = oddFirst(services.filter((s) => wanted(s.text)));
  showFindings(new Set(list.map(serviceKey)));
  showServices(list);
  $("filter-count").textContent = asked.q ? `${list.length.toLocaleString("en")} of ${services.length.toLocaleString("en")}` : "";
}

// ---- Findings ----

const severities = { error: ["✕", "error"], warning: ["!", "warning"], info: ["i", "info"] };

function severityMark(s, text = severities[s]?.[1] ?? s) {
  return el("span", { class: `mark ${s}` }, el("span", { "aria-hidden": "true" }, severities[s]?.[0] ?? "?"), " ", text);
}

function countsBySeverity(list) {
  return Object.keys(severities).map((s) => [s, list.filter((f) => f.severity === s).length]).filter(([, n]) => n > 0);
}

// oddFirst sorts those with findings to the front, as "agent services" does.
function oddFirst(list) {
  const order = Object.keys(severities);
  const worst = new Map(list.map((s) => [s, Math.min(order.length, ...s.findings.map((f) => order.indexOf(f.severity)))]));
  return list.sort((a, b) => worst.get(a) - worst.get(b));
}

let findingsPrint = null;
let findingsShown = manyFindings;

function showFindings(keys) {
  // Those about the node concern every Service.
  const list = findings.filter((f) => !f.service || keys.has(serviceKey(f.service)));
  const print = JSON.stringify([list, findings.length]);
  if (print === findingsPrint) return;
  findingsPrint = print;
  const open = new Set([...$("findings").querySelectorAll("details[open]")].map((d) => d.dataset.key));
  $("findings-count").replaceChildren(...countsBySeverity(list).map(([s, n]) => severityMark(s, s === "info" ? `${n} info` : plural(n, s))));
  if (list.length === 0) {
    const none = findings.length === 0 ? "None: all that these rules say of Services is consistent." : `None that fits the filter, of ${plural(findings.length, "finding")}.`;
    $("findings").replaceChildren(el("p", { class: findings.length ? "quiet" : "quiet fine" }, none));
    return;
  }
  $("findings").replaceChildren(...list.slice(0, findingsShown).map((f) => findingView(f, open)));
  if (list.length > findingsShown) {
    $("findings").append(el("p", { class: "more" }, el("button", { type: "button", class: "plain", onclick: () => {
      findingsShown = Infinity;
      findingsPrint = null;
      showAll();
      $("findings").children[manyFindings]?.firstChild.focus();
    } }, `Show ${plural(list.length - findingsShown, "more finding")}`)));
  }
}

function findingView(f, open) {
  const key = [f.code, f.service ? serviceKey(f.service) : "", f.message].join("|");
  const rules = f.evidence.rules ?? [];
  const since = el("time", { datetime: f.since, title: f.since }, `since ${clock(f.since)}`);
  const more = el("div", { class: "evidence" });
  if (rules.length > 0) {
    more.append(el("p", {}, rules.length === 1 ? "The rule:" : "The rules:"), el("ol", { class: "rules" }, ...rules.map((r) => el("li", {}, ruleText(r)))));
  }
  const objects = f.evidence.objects ?? [];
  if (objects.length > 0) {
    more.append(el("p", {}, "In the API: ", ...objects.flatMap((o, i) => [i > 0 ? ", " : "", el("span", { class: "mono" }, o)])));
  }
  const flows = f.evidence.flows ?? [];
  if (flows.length > 0) more.append(el("p", {}, "Tracked connections:"), el("ol", { class: "rules" }, ...flows.map((t) => el("li", {}, t))));
  more.append(el("p", { class: "links" },
    f.service && el("button", { type: "button", class: "plain", onclick: () => go({ q: serviceName(f.service) }) }, `Show only ${serviceName(f.service)}`),
    el("a", { href: `https://github.com/natlens/natlens/blob/main/docs/findings.md#${f.code.toLowerCase()}`, rel: "noreferrer", target: "_blank" }, `What ${f.code} means, and what to do`)));
  return el("details", { class: `finding ${f.severity}`, "data-key": key, open: open.has(key) },
    el("summary", {},
      el("span", { class: "finding-head" }, severityMark(f.severity), el("strong", {}, f.code), el("span", { class: "mono" }, f.service ? serviceName(f.service) : "this node"), since),
      el("span", { class: "message" }, f.message)),
    more);
}

// ruleText makes the target of a rule stand out and its comment step back; the
// text stays as iptables-save prints it, so that it can be copied.
function ruleText(rule) {
  const parts = rule.split(/( -m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+)|(?:^| )-[jg] .*$)/);
  return el("code", {}, ...parts.map((p, i) => (i % 2 === 0 ? p : el("span", { class: p.startsWith(" -m comment") ? "dim" : "target" }, p))));
}

// ---- Services ----

const verdicts = {
  dnat: { word: "delivered" },
  reject: { mark: "✕", word: "rejected", text: "the client is refused at once" },
  drop: { mark: "⊘", word: "dropped", text: "the client waits until it gives up" },
  none: { mark: "?", word: "not handled", text: "no rule sends it to an endpoint" },
  accept: { mark: "?", word: "accepted", text: "a rule lets it through to this very address" },
  mixed: { mark: "≠", word: "mixed", text: "" },
};

const bodies = new Map(); // by key: the rows of a Service, and what they were made of
const expanded = new Set(); // routes whose endpoints are all shown

function showServices(list) {
  const visible = list.slice(0, shown);
  const table = $("services");
  const next = visible.map((s) => {
    const key = serviceKey(s);
    const old = bodies.get(key);
    if (old?.print === s.print) {
      if (old.seen !== s.seen) showObserved(old.body, s, key);
      old.seen = s.seen;
      return old.body;
    }
    const body = serviceView(s, key);
    showObserved(body, s, key);
    if (old) body.classList.add("changed");
    bodies.set(key, { print: s.print, seen: s.seen, body });
    return body;
  });
  place(table, next);
  const known = new Set(services.map(serviceKey));
  for (const key of bodies.keys()) if (!known.has(key)) bodies.delete(key);

  table.hidden = list.length === 0;
  $("services-count").textContent = asked.q ? `${list.length.toLocaleString("en")} of ${plural(services.length, "port")}` : plural(services.length, "port");
  $("services-empty").hidden = list.length > 0;
  $("services-empty").textContent = services.length === 0 ? "These rules hold no Services." : `No Service fits “${asked.q}”.`;
  $("more").hidden = list.length <= shown;
  $("more").textContent = `Show ${Math.min(pageSize, list.length - shown)} more of ${(list.length - shown).toLocaleString("en")}`;
}

// place makes the bodies the table's, and moves only those that are not in
// their place yet: what has the focus keeps it.
function place(table, bodies) {
  const keep = new Set(bodies);
  for (const b of [...table.tBodies]) if (!keep.has(b)) b.remove();
  let at = table.tHead.nextElementSibling;
  for (const b of bodies) {
    if (b === at) at = at.nextElementSibling;
    else table.insertBefore(b, at);
  }
}

function serviceView(s, key) {
  const head = el("th", { colspan: 3, scope: "rowgroup" },
    el("span", { class: "service-name" }, s.namespace ? el("span", { class: "dim" }, `${s.namespace}/`) : "", el("strong", {}, s.name), s.port ? `:${s.port}` : ""),
    el("span", { class: "badge" }, s.protocol),
    s.sessionAffinity && el("span", { class: "badge", title: "A client that comes back within this time gets the same endpoint again" }, `${s.sessionAffinity.type} affinity, ${duration(s.sessionAffinity.timeoutSeconds)}`),
    s.echo && echoMark(s.echo),
    ...countsBySeverity(s.findings).map(([sev, n]) => severityMark(sev, sev === "info" ? `${n} info` : plural(n, sev))));
  const body = el("tbody", {}, el("tr", { class: "service" }, head));
  s.frontends.forEach((f, i) => {
    const fates = byFate(f.routes);
    fates.forEach((fate, j) => {
      body.append(el("tr", { class: j > 0 ? undefined : i === s.frontends.length - 1 ? "first last" : "first" },
        j === 0 && el("th", { scope: "row", rowspan: fates.length }, ...frontendView(s, f)),
        el("td", { class: "from" }, ...fate.sources.map((r) => sourceView(s, f, r))),
        el("td", {}, ...fateView(s, f, fate, `${key} ${i} ${j}`))));
    });
  });
  return body;
}

// The verdicts of the echo monitor, the worst first. Counts are in api/v1/echo: here
// they would make every Service new with every connection.
const echoWords = {
  skewed: "traffic does not follow the shares",
  unknown: "traffic: cannot tell",
  "not-enough": "traffic: not enough connections yet",
  "no-endpoints": "traffic: no endpoints",
  affinity: "traffic: kept at one endpoint",
  consistent: "traffic follows the shares",
};

function worstEcho(ports) {
  const order = Object.keys(echoWords);
  const [worst] = [...ports].sort((a, b) => order.indexOf(a.verdict) - order.indexOf(b.verdict));
  return worst && { verdict: worst.verdict, reason: worst.reason };
}

function echoMark({ verdict, reason }) {
  const text = echoWords[verdict] ?? verdict;
  const title = reason ? sentence(reason) : "What connections from this node to the ClusterIP met, beside the programmed shares";
  return verdict === "skewed" ? severityMark("warning", text) : el("span", { class: "badge", title }, text);
}

// showObserved puts what traffic did behind a Service's frontends. It leaves the
// rows before it alone: what is counted changes all the time.
function showObserved(body, s, key) {
  body.querySelector("tr.observed")?.remove();
  const o = s.observed;
  if (!o || (o.connections === undefined && o.flows === undefined && !o.notCounted)) return;
  const sums = [
    o.connections !== undefined && plural(o.connections, "connection") + (o.since ? ` since ${clock(o.since)}` : ""),
    o.flows !== undefined && plural(o.flows, "flow"),
    o.staleFlows > 0 && `${plural(o.staleFlows, "flow")} to what is no endpoint any more`,
    o.notCounted && `not counted: ${o.notCounted}`,
    o.flowsError,
  ].filter(Boolean);
  const view = [el("p", { class: "sum" }, sums.join(", "))];
  const chips = o.endpoints.map((e) => observedView(s, e));
  if (chips.length) view.push(endpointList(chips, `${key} observed`));
  body.append(el("tr", { class: "observed first last" }, el("th", { scope: "row" }, el("span", { class: "type" }, "Observed")), el("td", { class: "from" }, "all frontends"), el("td", {}, ...view)));
}

function observedView(s, e) {
  const wanted = s.desired && (s.desired.endpoints.includes(e.address) ? `wanted ${percent(1 / s.desired.endpoints.length)}` : "not wanted by a pod");
  const title = [e.connections !== undefined && plural(e.connections, "connection"), e.flows !== undefined && plural(e.flows, "flow"), e.pinned !== undefined && `${plural(e.pinned, "client")} bound${e.pinnedFull ? ", the list is full" : ""}`, wanted].filter(Boolean).join(", ");
  return el("li", {}, el("span", { class: "endpoint", title },
    el("span", { class: "mono" }, e.address),
    e.flows !== undefined && el("span", { class: "dim" }, plural(e.flows, "flow")),
    e.pinned !== undefined && el("span", { class: "dim" }, `${plural(e.pinned, "client")} bound`),
    el("span", { class: "percent" }, e.share !== undefined ? percent(e.share) : e.connections !== undefined ? "none" : "—"), bar(e.share ?? 0)));
}

// byFate puts routes together that differ in nothing but the masquerade.
function byFate(routes) {
  const out = new Map();
  for (const r of routes) {
    const mixed = r.endpoints.some((e) => e.masquerade !== undefined);
    const print = JSON.stringify([r.verdict, r.undelivered, r.unknown, mixed && r.masquerade, r.endpoints.map((e) => [e.address, e.share, e.maxShare, e.masquerade])]);
    if (!out.has(print)) out.set(print, { route: r, sources: [] });
    out.get(print).sources.push(r);
  }
  return [...out.values()];
}

function frontendView(s, f) {
  const places = f.address ? [hostPort(f.address, f.port)] : (f.accepted ?? []).map((a) => hostPort(a, f.port));
  const view = [el("span", { class: "type" }, f.type)];
  for (const p of places) view.push(traceButton(s, p, "pod", p, "mono frontend"));
  if (places.length === 0) {
    view.push(el("button", { type: "button", class: "link mono frontend", title: `Trace a connection to port ${f.port} of this node`, onclick: () => traceNodePort(s, f, "pod") }, `any address:${f.port}`));
  }
  return view;
}

function sourceView(s, f, r) {
  const buttons = r.from.map((c) => {
    const from = r.sources ? r.sources[0].split("/")[0] : c;
    return f.address || f.accepted
      ? traceButton(s, hostPort(f.address || f.accepted[0], f.port), from, c, `class ${c}`)
      : el("button", { type: "button", class: `link class ${c}`, title: `Trace from ${c}`, onclick: () => traceNodePort(s, f, from) }, c);
  });
  return el("div", { class: "source" }, ...buttons,
    r.sources && el("span", { class: "ranges mono" }, r.sources.join(", ")),
    r.masquerade && el("span", { class: "badge", title: "The endpoint sees an address of this node as the source, not the client's" }, "masquerade"));
}

function traceButton(s, to, from, text, cls, endpoint = "") {
  return el("button", {
    type: "button", class: `link ${cls}`, title: `Trace a connection from ${from} to ${to}`,
    onclick: () => go({ trace: `${to}/${s.protocol.toLowerCase()}`, from, to: endpoint }),
  }, text);
}

// traceNodePort asks the agent for the node's address first: the rules do not
// name one.
async function traceNodePort(s, f, from, endpoint = "") {
  const anywhere = f.family === "ipv6" ? "[2001:db8:99::99]:9" : "198.18.99.99:9";
  try {
    const t = await get(`api/v1/trace?${new URLSearchParams({ to: anywhere, from: "node" })}`);
    go({ trace: `${hostPort(t.packet.from, f.port)}/${s.protocol.toLowerCase()}`, from, to: endpoint });
  } catch (e) {
    offline = e.message;
    showHeader();
  }
}

function fateView(s, f, { route: r, sources }, key) {
  const view = [];
  const from = sources[0].sources ? sources[0].sources[0].split("/")[0] : sources[0].from[0];
  const uneven = isUneven(r);
  if (r.verdict !== "dnat") view.push(verdictView(r));
  else view.push(el("p", { class: "sum" }, sumText(r), uneven && severityMark("warning", "uneven")));
  if (r.unknown) view.push(el("details", { class: "unknown" }, el("summary", {}, severityMark("warning", `depends on ${plural(r.unknown.length, "rule")} that cannot be decided`)), el("ol", { class: "rules" }, ...r.unknown.map((t) => el("li", {}, ruleText(t))))));
  const chips = r.endpoints.map((e) => endpointView(e, uneven, () => {
    if (f.address || f.accepted) go({ trace: `${hostPort(f.address || f.accepted[0], f.port)}/${s.protocol.toLowerCase()}`, from, to: e.address });
    else traceNodePort(s, f, from, e.address);
  }));
  if (chips.length && r.undelivered > 0) chips.push(lostView(r));
  if (chips.length) view.push(endpointList(chips, key));
  return view;
}

function isUneven(r) {
  const shares = r.endpoints.map((e) => e.share);
  return shares.length > 1 && !r.unknown && Math.max(...shares) - Math.min(...shares) > evenWithin;
}

function sumText(r) {
  const n = plural(r.endpoints.length, "endpoint");
  if (r.endpoints.length < 2 || r.unknown || isUneven(r)) return n;
  return `${n}, ${percent(r.endpoints[0].share)} each`;
}

function verdictView(r) {
  const v = verdicts[r.verdict] ?? { mark: "?", word: r.verdict, text: "" };
  let text = v.text;
  if (r.verdict === "mixed") text = r.unknown ? `${lostText(r)} may reach no endpoint` : `${percent(1 - r.undelivered)} reach an endpoint, ${lostText(r)} do not`;
  return el("p", { class: `verdict ${r.verdict}` }, el("span", { class: "word" }, el("span", { "aria-hidden": "true" }, v.mark), " ", v.word), el("span", {}, text));
}

function bar(share, most = share) {
  const fill = el("span", { class: "fill" });
  fill.style.width = `${100 * share}%`;
  const track = el("span", { class: "bar", "aria-hidden": "true" }, fill);
  if (most > share) {
    const maybe = el("span", { class: "maybe" });
    maybe.style.width = `${100 * (most - share)}%`;
    track.append(maybe);
  }
  return track;
}

function endpointView(e, uneven, onclick) {
  return el("li", { class: uneven ? "uneven" : undefined },
    el("button", { type: "button", class: "endpoint", title: `${e.chain ? e.chain + ", " : ""}exactly ${e.exact && e.exact.length < 60 ? e.exact : e.share}: trace it`, onclick },
      el("span", { class: "mono" }, e.address), e.masquerade && el("span", { class: "badge" }, "masquerade"), el("span", { class: "percent" }, shareText(e)), bar(e.share, e.maxShare)));
}

// Where a rule cannot be decided, the API tells the most that may be lost.
const lostText = (r) => (r.unknown ? "up to " : "") + percent(r.undelivered);

function lostView(r) {
  return el("li", { class: "lost" }, el("span", { class: "endpoint" }, el("span", {}, "no endpoint"), el("span", { class: "percent" }, lostText(r)), r.unknown ? bar(0, r.undelivered) : bar(r.undelivered)));
}

function endpointList(chips, key) {
  const list = el("ul", { class: "endpoints" });
  if (chips.length <= manyEndpoints || expanded.has(key)) {
    list.append(...chips);
    return list;
  }
  const few = manyEndpoints - 1;
  const all = el("li", {}, el("button", { type: "button", class: "plain", onclick: () => {
    expanded.add(key);
    all.replaceWith(...chips.slice(few));
    chips[few].firstChild.focus();
  } }, `Show all ${chips.length}`));
  list.append(...chips.slice(0, few), all);
  return list;
}

// ---- Trace ----

let traced = ""; // the question that the panel answers
let opener = null; // gets the focus back

function showTrace() {
  const panel = $("trace");
  const question = asked.trace ? hashOf({ ...asked, q: "" }) : "";
  if (question === traced) return;
  const wasOpen = !panel.hidden;
  traced = question;
  if (!question) {
    closePanel();
    return;
  }
  fillForm();
  if (!wasOpen) openPanel();
  runTrace(question);
}

function openPanel() {
  opener = document.activeElement;
  $("trace").hidden = false;
  document.body.classList.add("tracing");
  $("trace-heading").focus({ preventScroll: matchMedia("(min-width: 75rem)").matches });
}

function closePanel() {
  if ($("trace").hidden) return;
  $("trace").hidden = true;
  document.body.classList.remove("tracing");
  if (opener?.isConnected) opener.focus();
}

function fillForm() {
  const [to, protocol] = asked.trace.split("/");
  $("trace-to").value = to;
  $("trace-protocol").value = (protocol || "tcp").toLowerCase();
  const isClass = ["pod", "node", "external"].includes(asked.from);
  $("trace-from").value = isClass ? asked.from : "ip";
  $("trace-ip").value = isClass ? "" : asked.from;
  $("trace-ip-field").hidden = isClass;
}

async function runTrace(question) {
  const [to, protocol] = asked.trace.split("/");
  const result = $("trace-result");
  result.setAttribute("aria-busy", "true");
  let heading = [];
  let view;
  try {
    const t = await get(`api/v1/trace?${new URLSearchParams({ to, protocol: protocol || "tcp", from: asked.from })}`);
    heading = questionView(t.packet);
    view = traceView(t);
  } catch (e) {
    heading = ["This cannot be traced."];
    view = [el("p", { class: "alert error" }, sentence(e.message))];
  }
  if (question !== traced) return; // another question came up meanwhile
  result.removeAttribute("aria-busy");
  $("trace-question").replaceChildren(...heading);
  result.replaceChildren(...view);
  result.querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
}

function questionView(p) {
  const from = { pod: "a pod", node: "the node", external: "outside" }[p.class] ?? p.class;
  return [`A new ${p.protocol} connection from ${from} (`, el("span", { class: "mono" }, p.from), ") to ", el("span", { class: "mono" }, hostPort(p.to, p.port)), ":"];
}

function traceView(t) {
  const view = [el("ul", { class: "endpoints outcomes" }, ...t.outcomes.map((o) => outcomeView(o)))];
  if (t.unknown.length > 0) {
    view.push(el("div", { class: "alert warning" }, el("strong", {}, `${plural(t.unknown.length, "rule")} could not be decided.`), " The answer depends on ", t.unknown.length === 1 ? "it:" : "them:", el("ol", { class: "rules" }, ...t.unknown.map((r) => el("li", {}, ruleText(r))))));
  }
  view.push(el("h3", {}, "Rule by rule"), treeView(t.outcomes));
  return view;
}

function outcomeView(o) {
  const v = verdicts[o.verdict] ?? { mark: "?", word: o.verdict };
  const name = o.verdict === "dnat" ? el("span", { class: "mono" }, `→\u00a0${o.to}`) : el("span", {}, `${v.mark} ${v.word}`);
  return el("li", { class: { reject: "lost", drop: "lost", none: "passed", accept: "passed" }[o.verdict] },
    el("span", { class: "endpoint", title: o.exact && o.exact.length < 60 ? `exactly ${o.exact}` : undefined },
      name, o.masquerade && el("span", { class: "badge" }, "masquerade"), el("span", { class: "percent" }, shareText(o)), bar(o.share, o.maxShare)));
}

// treeView draws the paths of all outcomes as one tree: what they have in
// common once, and a branch from where they part.
function treeView(outcomes) {
  const root = { children: [], outcomes: [] };
  for (const o of outcomes) {
    let at = root;
    for (const step of withDepth(o.path)) {
      const key = [step.table, step.chain, step.number, step.effect].join(" ");
      let next = at.children.find((c) => c.key === key);
      if (!next) {
        next = { key, step, children: [], outcomes: [] };
        at.children.push(next);
      }
      at = next;
      at.outcomes.push(o);
    }
    at.end = o;
  }
  return el("div", { class: "tree" }, ...runView(root, "", 0));
}

// withDepth tells how deep in jumps each step stands. A path lists the rules
// that matched; chains that end without one are left without a trace.
function withDepth(path) {
  let stack = [];
  return path.map((s) => {
    const name = `${s.table} ${s.chain}`;
    const i = stack.lastIndexOf(name);
    stack = i < 0 ? [name] : stack.slice(0, i + 1);
    const step = { ...s, depth: stack.length - 1 };
    const jump = /^(?:jump|goto) (.+)$/.exec(s.effect);
    if (jump) stack.push(`${s.table} ${jump[1]}`);
    return step;
  });
}

// runView draws a node's successors up to where they part, and each part.
function runView(node, chain, base) {
  const view = [];
  let rewritten = false;
  while (node.children.length === 1 && !node.end) {
    node = node.children[0];
    if (rewritten && onlyDelivered(node)) { // behind the DNAT nothing changes any more
      view.push(restView(node, chain, base));
      return view;
    }
    const name = `${node.step.table} ${node.step.chain}`;
    if (name !== chain) view.push(chainView(node.step, base));
    chain = name;
    view.push(stepView(node.step, base));
    rewritten ||= /^(dnat|redirect)/.test(node.step.effect);
  }
  if (node.end) view.push(endView(node.end));
  const branches = node.children.toSorted((a, b) => a.step.number - b.step.number);
  const first = branches[0]?.step;
  if (first && branches.every((b) => b.step.chain === first.chain && b.step.table === first.table)) {
    if (`${first.table} ${first.chain}` !== chain) view.push(chainView(first, base));
    chain = `${first.table} ${first.chain}`;
  }
  for (const b of branches) view.push(branchView(b, chain, base, branches.length <= 3));
  return view;
}

const onlyDelivered = (node) => node.outcomes.length === 1 && node.outcomes[0].verdict === "dnat";

function restView(node, chain, base) {
  const rest = [];
  let n = 0;
  let last = null;
  while (node) {
    const name = `${node.step.table} ${node.step.chain}`;
    if (name !== chain) rest.push(chainView(node.step, base));
    chain = name;
    rest.push(stepView(node.step, base));
    n++;
    last = node;
    node = node.children[0];
  }
  return el("div", {}, el("details", { class: "rest" }, el("summary", {}, `then ${plural(n, "more rule")} on the way out`), ...rest), endView(last.end));
}

function branchView(node, chain, base, open) {
  const one = node.outcomes.length === 1 ? node.outcomes[0] : null;
  const chosen = asked.to && one?.to === asked.to;
  const title = one ? (one.verdict === "dnat" ? `→ ${one.to}` : verdicts[one.verdict]?.word ?? one.verdict) : plural(node.outcomes.length, "outcome");
  const share = one ? shareText(one) : percent(node.step.share);
  const fork = { children: [node], outcomes: node.outcomes };
  const details = el("details", { class: `branch${chosen ? " chosen" : ""}`, open: asked.to ? chosen : open },
    el("summary", {}, el("span", { class: "percent" }, share), el("span", { class: "mono" }, title), el("span", { class: "dim" }, `by rule ${node.step.number}`)),
    ...runView(fork, chain, node.step.depth));
  indent(details, node.step.depth - base);
  return details;
}

function indent(e, depth) {
  e.style.marginInlineStart = `${Math.min(Math.max(depth, 0), 6) * 0.75}rem`;
}

function chainView(step, base) {
  const e = el("p", { class: "chain" }, el("span", { class: "dim" }, step.table), " ", step.chain);
  indent(e, step.depth - base);
  return e;
}

function stepView(step, base) {
  const rule = step.rule.startsWith(`-A ${step.chain} `) ? step.rule.slice(`-A ${step.chain} `.length) : step.rule;
  const e = el("div", { class: "step" },
    el("span", { class: "number", title: `Rule ${step.number} of ${step.chain}` }, String(step.number)),
    el("span", {}, ruleText(rule), saysMore(step) && el("span", { class: "effect" }, step.effect)),
    el("span", { class: "shares" },
      el("span", { class: "percent", title: "Of all connections" }, percent(step.share)),
      step.probability < 1 && el("span", { class: "badge", title: "Of the connections that reach this rule" }, `takes ${percent(step.probability)}`)));
  indent(e, step.depth - base);
  return e;
}

// saysMore tells whether the effect of a rule is not plain from its text.
function saysMore(step) {
  const words = step.effect.toLowerCase().split(" ");
  if (words[0] === "jump" || words[0] === "goto") words.shift();
  const rule = step.rule.toLowerCase();
  return !words.every((w) => rule.includes(w));
}

function endView(o) {
  const text = o.verdict === "dnat" ? `sent to ${o.to}` : `${verdicts[o.verdict]?.word ?? o.verdict}: ${verdicts[o.verdict]?.text ?? ""}`;
  return el("p", { class: `end ${o.verdict}` }, el("strong", {}, text), o.masquerade && el("span", { class: "badge" }, "masquerade"), el("span", {}, shareText(o)),
    o.exact && o.exact.length < 60 && o.share < 1 && el("span", { class: "dim mono" }, o.exact));
}

// ---- Start ----

let typing = 0;

$("filter").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    asked = { ...asked, q: $("filter").value };
    // Not a step in the history for every letter.
    history.replaceState(null, "", hashOf(asked));
    shown = pageSize;
    showAll();
  }, 80);
});
$("filter-form").addEventListener("submit", (e) => e.preventDefault());
$("more").addEventListener("click", () => {
  shown += pageSize;
  showAll();
});
$("skip").addEventListener("click", (e) => {
  e.preventDefault(); // the fragment belongs to the filter
  $("services-heading").focus();
  $("services-heading").scrollIntoView();
});
$("trace-open").addEventListener("click", () => {
  if ($("trace").hidden) openPanel();
  $("trace-to").focus();
});
$("trace-close").addEventListener("click", () => {
  if (asked.trace) go({ trace: "" });
  else closePanel();
});
$("trace-from").addEventListener("change", () => {
  const byAddress = $("trace-from").value === "ip";
  $("trace-ip-field").hidden = !byAddress;
  if (byAddress) $("trace-ip").focus();
  else if ($("trace-to").value) $("trace-form").requestSubmit();
});
$("trace-form").addEventListener("submit", (e) => {
  e.preventDefault();
  const from = $("trace-from").value === "ip" ? $("trace-ip").value.trim() : $("trace-from").value;
  traced = null; // ask again, even the same: the rules may be others now
  go({ trace: `${$("trace-to").value.trim()}/${$("trace-protocol").value}`, from: from || "pod", to: "" });
});
document.addEventListener("keydown", (e) => {
  const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
  if (e.key === "/" && !writing && !e.ctrlKey && !e.metaKey && !e.altKey) {
    e.preventDefault();
    $("filter").focus();
    $("filter").select();
  }
  if (e.key === "Escape" && !$("trace").hidden && document.activeElement !== $("filter")) $("trace-close").click();
});
addEventListener("hashchange", apply);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) load(!live);
});

asked = { ...readHash(), trace: "" };
$("filter").value = asked.q;
await load(true);
apply();
listen();
setInterval(() => {
  if (!document.hidden) load(!live || services.length <= pageSize); // what is counted is no event
}, pollEvery);
setInterval(showHeader, 1000);
get("version").then((v) => ($("version").textContent = `natlens ${v.version}`), () => {});
