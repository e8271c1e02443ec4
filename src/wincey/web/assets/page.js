// The page: what is selected, what is searched for, which view is shown, and the picture that is fetched every few seconds.

import { Detail } from "./detail.js";
import { NetworkMap } from "./map.js";
import { Tables } from "./tables.js";
import { STATES, element, rate, traffic } from "./text.js";

const get = (id) => document.getElementById(id);
const state = { picture: null, selection: null, view: "map", search: "", at: 0, trouble: "" };

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname); // out of the address bar, and of what is copied from it
}

async function fetchJson(path) {
  const token = sessionStorage.getItem("token");
  const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {}, signal: AbortSignal.timeout(20000) });
  if (answer.status === 401) {
    const login = get("login");
    get("refused").textContent = token ? "That is not the token." : "";
    sessionStorage.removeItem("token");
    if (!login.open) login.showModal();
    throw new Error("it takes a token");
  }
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error ?? `HTTP status ${answer.status}`);
  return body;
}

async function ask(from, to) {
  try {
    return await fetchJson(`v1/explain?${new URLSearchParams({ from, to })}`);
  } catch (error) {
    return { error: error.message };
  }
}

let timer = 0;
async function refresh() {
  clearTimeout(timer);
  try {
    const watch = state.selection?.kind === "host" ? `?${new URLSearchParams({ watch: state.selection.id })}` : "";
    state.picture = await fetchJson(`v1/picture${watch}`);
    state.at = Date.now();
    state.trouble = "";
  } catch (error) {
    state.trouble = error.message;
  }
  render();
  timer = setTimeout(refresh, document.hidden ? 30000 : (state.picture?.every ?? 3) * 1000);
}

function toNumber(text) { // an IPv4 address as a number
  const parts = text.split(".");
  if (parts.length !== 4 || !parts.every((part) => /^\d{1,3}$/.test(part) && part < 256)) return null;
  return parts.reduce((sum, part) => sum * 256 + Number(part), 0);
}

function holds(subnet, address) {
  const [base, length] = subnet.split("/");
  const size = 2 ** (32 - Number(length));
  const start = toNumber(base);
  return start !== null && Math.floor(start / size) === Math.floor(address / size);
}

function matching() {
  const words = state.search.trim().toLowerCase();
  if (!words) return null;
  const address = toNumber(words);
  const found = state.picture.hosts.filter((host) =>
    [host.name, host.id, ...host.public, ...host.subnets, ...host.containers.map((each) => each.address)].some((text) => text.toLowerCase().includes(words)) ||
    (address !== null && host.subnets.some((subnet) => holds(subnet, address))));
  return new Set(found.map((host) => host.id));
}

function select(selection, { keyboard = false } = {}) {
  const before = state.selection;
  state.selection = selection;
  render();
  if (selection?.kind === "host") refresh();
  if (keyboard && selection) get("detail").focus({ preventScroll: true });
  if (keyboard && !selection && before) back(before);
}

function back(selection) { // to where the keyboard was before
  if (state.view === "map") map.focus(selection.kind === "host" ? selection.id : map.focused);
  else get("table").querySelector(`[data-key="${CSS.escape(selection.id)}"]`)?.focus();
}

function summary(picture) {
  const count = (kind) => picture.hosts.filter((host) => host.state === kind).length;
  const flows = picture.hosts.map(traffic).filter(Boolean);
  const faults = picture.links.filter((link) => link.state !== "ok").length;
  const parts = [[picture.hosts.length, "hosts"], [picture.links.length + picture.untold, picture.untold ? `links, ${picture.links.length} of them shown` : "links"]];
  if (faults) parts.push([faults, "links with faults"]);
  const containers = picture.hosts.reduce((sum, host) => sum + host.containers.length, 0);
  if (containers) parts.push([containers, "containers"]);
  if (flows.length) parts.push([rate(flows.reduce((sum, flow) => sum + flow.send, 0)), "sent"]);
  get("summary").replaceChildren(...parts.map(([value, name]) => element("span", {}, element("b", {}, String(value)), ` ${name}`)));
  get("legend").replaceChildren(...Object.entries(STATES).filter(([kind]) => count(kind)).map(([kind, words]) => element("li", { class: kind }, `${count(kind)} ${words}`)));
}

function render() {
  get("live").className = state.trouble ? "stale" : "";
  const said = state.trouble ? `No picture: ${state.trouble}` : "Live";
  if (get("live").textContent !== said) get("live").textContent = said;
  const { picture } = state;
  if (!picture) return;
  const backends = [...new Set(picture.hosts.map((host) => host.backend).filter(Boolean))];
  get("network").textContent = [picture.network, picture.networks.join(", "), backends.join(", ")].filter(Boolean).join(" · ");
  get("source").textContent = `Hosts by ${picture.source}`;
  get("notes").hidden = !picture.notes.length;
  get("notes").textContent = picture.notes.join("; ");
  summary(picture);
  const found = matching();
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.view === state.view));
    tab.tabIndex = tab.dataset.view === state.view ? 0 : -1;
  }
  get("map").hidden = state.view !== "map";
  get("table").hidden = state.view === "map";
  detail.update(picture, state.selection);
  if (state.view === "map") map.update(picture, state.selection, found);
  else tables.update(state.view, picture, state.selection, found);
}

const THEMES = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" };
const system = matchMedia("(prefers-color-scheme: dark)");
function theme(change) {
  const names = Object.keys(THEMES);
  let chosen = localStorage.getItem("theme") ?? "auto";
  if (change) localStorage.setItem("theme", (chosen = names[(names.indexOf(chosen) + 1) % names.length]));
  document.documentElement.dataset.theme = chosen === "auto" ? (system.matches ? "dark" : "light") : chosen;
  get("theme").textContent = THEMES[chosen];
  get("theme").setAttribute("aria-label", `Colours: ${chosen}`);
  map?.draw();
}

const map = new NetworkMap(select);
const tables = new Tables(select);
const detail = new Detail(select, ask);

theme(false);
system.addEventListener("change", () => theme(false));
get("theme").addEventListener("click", () => theme(true));
for (const tab of document.querySelectorAll("[role=tab]")) {
  const show = (name) => { state.view = name; render(); };
  tab.addEventListener("click", () => show(tab.dataset.view));
  tab.addEventListener("keydown", (event) => {
    const next = { ArrowRight: tab.nextElementSibling, ArrowLeft: tab.previousElementSibling }[event.key];
    if (next) (show(next.dataset.view), next.focus());
  });
}
get("search").addEventListener("input", (event) => { state.search = event.target.value; if (state.picture) render(); });
get("search").addEventListener("keydown", (event) => {
  const found = state.picture ? [...(matching() ?? [])] : [];
  if (event.key === "Enter" && found.length) select({ kind: "host", id: found[0] }, { keyboard: true });
});
get("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", get("token").value.trim());
  get("token").value = "";
  get("login").close();
  refresh();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.matches("input")) (event.preventDefault(), get("search").focus());
  if (event.key !== "Escape" || get("login").open) return;
  if (event.target === get("search") && state.search) (get("search").value = state.search = "", render());
  else if (state.selection) select(null, { keyboard: true });
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
