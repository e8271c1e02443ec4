// Words and elements: how figures are written, and how elements are made. Text from hosts only ever becomes text nodes.

export const STATES = { ok: "well", warn: "look at it", bad: "broken", lease: "only its lease is known" };
export const RANK = { bad: 0, warn: 1, lease: 2, ok: 3 };

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const value = seconds * 1000;
  return `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;
}

export const percent = (part) => (part === null || part === undefined ? "–" : `${Math.round(part * 100)}%`);

export function rate(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  let value = bytes * 8;
  for (const unit of ["bit/s", "kbit/s", "Mbit/s"]) {
    if (value < 1000) return `${value < 10 && unit !== "bit/s" ? value.toFixed(1) : Math.round(value)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} Gbit/s`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export function traffic(host) {
  const known = host.devices.filter((device) => device.send !== null);
  if (!known.length) return null;
  return known.reduce((sum, device) => ({ receive: sum.receive + device.receive, send: sum.send + device.send }), { receive: 0, send: 0 });
}

export function linkFigures(link) {
  const known = link.ways.filter((way) => way.rtt !== null);
  const lost = link.ways.map((way) => way.loss).filter((loss) => loss !== null);
  const sizes = link.ways.map((way) => way.mtu).filter((mtu) => mtu);
  const flows = link.ways.filter((way) => way.send !== null).map((way) => way.send + way.receive);
  return {
    flow: flows.length ? Math.max(...flows) : null,
    rtt: known.length ? Math.max(...known.map((way) => way.rtt)) : null,
    loss: lost.length ? Math.max(...lost) : null,
    mtu: sizes.length ? Math.min(...sizes) : null,
  };
}

export const linkId = (link) => `${link.a} ${link.b}`;
export const badge = (state) => element("span", { class: `badge ${state}` }, STATES[state]);
