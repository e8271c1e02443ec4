// The map: hosts as elements of an SVG (so that keyboard and screen readers have them), links on the canvas behind it.
// Few hosts stand on a ring; many fill a disc in the order of their subnets, like a sunflower's seeds, so that a host keeps
// its place and neighbours in address are neighbours in the picture.

import { STATES, linkFigures, linkId, milliseconds, percent, rate, traffic } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";
const ON_A_RING = 24;
const GOLDEN = Math.PI * (3 - Math.sqrt(5));
const PODS = 12;

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function layout(hosts) {
  const places = new Map();
  const count = hosts.length;
  hosts.forEach((host, index) => {
    if (count === 1) places.set(host.id, { x: 0, y: 0 });
    else if (count <= ON_A_RING) {
      const radius = Math.max(150, count * 23);
      const angle = -Math.PI / 2 + (index / count) * 2 * Math.PI;
      places.set(host.id, { x: radius * 1.35 * Math.cos(angle), y: radius * Math.sin(angle) });
    } else {
      const distance = 24 * Math.sqrt(index + 0.6);
      places.set(host.id, { x: distance * 1.5 * Math.cos(index * GOLDEN), y: distance * 0.86 * Math.sin(index * GOLDEN) });
    }
  });
  return places;
}

export class NetworkMap {
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.canvas = document.getElementById("wires");
    this.svg = document.getElementById("nodes");
    this.stage = document.getElementById("stage");
    this.nodes = new Map();
    this.places = new Map();
    this.view = null; // { scale, x, y }, null while all is shown
    this.hovered = null;
    this.focused = null;
    this.matching = null;
    this.selection = null;
    this.picture = { hosts: [], links: [] };
    new ResizeObserver(() => this.draw()).observe(this.svg);
    this.listen();
  }

  update(picture, selection, matching) {
    this.picture = picture;
    this.selection = selection;
    this.matching = matching;
    const ids = picture.hosts.map((host) => host.id).join();
    if (ids !== this.ids) {
      this.ids = ids;
      this.places = layout(picture.hosts);
      for (const [id, node] of this.nodes) if (!this.places.has(id)) (node.remove(), this.nodes.delete(id));
    }
    this.dense = picture.hosts.length > ON_A_RING;
    if (!this.places.has(this.focused)) this.focused = picture.hosts[0]?.id ?? null;
    for (const host of picture.hosts) this.node(host);
    this.draw();
  }

  node(host) {
    let node = this.nodes.get(host.id);
    if (!node) {
      node = shape("g", { role: "button" });
      node.dataset.id = host.id;
      this.nodes.set(host.id, node);
      this.stage.append(node);
    }
    const { x, y } = this.places.get(host.id);
    const flow = traffic(host);
    const outward = y < -1 ? -1 : 1; // containers and words stand away from the links
    const busy = flow ? Math.min(1, Math.log10(1 + flow.send + flow.receive) / 9) : 0;
    const radius = this.dense ? 7 + 4 * busy : 22;
    const chosen = this.selection?.kind === "host" && this.selection.id === host.id;
    const named = this.dense && (host.state === "bad" || this.matching?.size <= 12) && (!this.matching || this.matching.has(host.id));
    const key = JSON.stringify([host.state, host.name, host.containers.length, radius, this.dense, outward, flow && [rate(flow.send), rate(flow.receive)]]);
    node.setAttribute("transform", `translate(${x} ${y})`);
    node.setAttribute("tabindex", host.id === this.focused ? "0" : "-1");
    node.setAttribute("aria-pressed", chosen);
    node.setAttribute("class", ["node", host.state, this.dense && "dense", chosen && "chosen", named && "named", this.matching && !this.matching.has(host.id) && "faded"].filter(Boolean).join(" "));
    if (node.dataset.key === key) return;
    node.dataset.key = key;
    const words = [host.name, host.subnets.join(", "), STATES[host.state]];
    if (host.containers.length) words.push(`${host.containers.length} containers`);
    node.setAttribute("aria-label", words.join(", "));
    node.replaceChildren(shape("circle", { class: "halo", r: radius + 5 }), shape("circle", { class: "body", r: radius }));
    if (!this.dense) {
      node.append(shape("circle", { class: "core", r: 7 + 8 * busy }));
      const shown = Math.min(PODS, host.containers.length);
      for (let index = 0; index < shown; index++) {
        const angle = outward * Math.PI / 2 + (index - (shown - 1) / 2) * 0.36;
        node.append(shape("circle", { class: "pod", r: 4, cx: (radius + 14) * Math.cos(angle), cy: (radius + 14) * Math.sin(angle) }));
      }
    }
    const line = (number) => outward * (radius + (host.containers.length ? 35 : 22) + number * 16) + 4;
    const lines = [host.name, host.subnets[0], ...(flow ? [`↓ ${rate(flow.receive)}  ↑ ${rate(flow.send)}`] : [])];
    if (!this.dense && outward < 0) lines.reverse();
    const label = shape("text", { y: this.dense ? radius + 16 : line(lines.indexOf(host.name)) });
    label.textContent = host.name;
    node.append(label);
    if (this.dense) return;
    lines.forEach((words, number) => {
      if (words === host.name) return;
      const under = shape("text", { class: "under", y: line(number) });
      under.textContent = words;
      node.append(under);
    });
  }

  transform() {
    const { clientWidth: width, clientHeight: height } = this.svg;
    if (this.view) return this.view;
    let left = 0, right = 0, top = 0, bottom = 0;
    for (const { x, y } of this.places.values()) {
      (left = Math.min(left, x), right = Math.max(right, x), top = Math.min(top, y), bottom = Math.max(bottom, y));
    }
    const margin = this.dense ? 36 : 105;
    const scale = Math.min(1.5, width / (right - left + 2 * margin), (height - 48) / (bottom - top + 2 * margin));
    return { scale, x: width / 2 - (scale * (left + right)) / 2, y: (height - 28) / 2 - (scale * (top + bottom)) / 2 };
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.svg;
    if (!width) return;
    const view = this.transform();
    this.stage.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
    const ratio = devicePixelRatio || 1;
    if (this.canvas.width !== width * ratio || this.canvas.height !== height * ratio) (this.canvas.width = width * ratio, this.canvas.height = height * ratio);
    const pen = this.canvas.getContext("2d");
    const colours = getComputedStyle(document.documentElement);
    const colour = (name) => colours.getPropertyValue(`--${name}`).trim();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
    const host = this.selection?.kind === "host" ? this.selection.id : null;
    const near = this.hovered ?? host;
    const faint = this.dense ? Math.max(0.05, Math.min(0.5, 110 / (this.picture.links.length + 1))) : 0.75;
    this.drawn = [];
    const tint = { ok: colour("wire"), warn: colour("warn"), bad: colour("bad"), lease: colour("lease"), accent: colour("accent") };
    const waiting = [];
    for (const link of this.picture.links) {
      const chosen = this.selection?.kind === "link" && this.selection.id === linkId(link);
      const touches = near && (link.a === near || link.b === near);
      const rank = chosen ? 3 : touches ? 2 : link.state !== "ok" ? 1 : 0;
      waiting.push([rank, link]);
    }
    waiting.sort((first, second) => first[0] - second[0]);
    for (const [rank, link] of waiting) {
      const a = this.places.get(link.a), b = this.places.get(link.b);
      if (!a || !b) continue;
      const sees = !this.matching || this.matching.has(link.a) || this.matching.has(link.b);
      pen.globalAlpha = !sees ? 0.03 : rank >= 2 ? 1 : near && this.dense ? faint * 0.3 : rank ? (this.dense ? 0.75 : 1) : faint;
      pen.strokeStyle = rank === 3 ? tint.accent : rank === 2 && link.state === "ok" ? tint.accent : tint[link.state];
      pen.lineWidth = (rank === 3 ? 4 : rank ? 2 : 1.4) / Math.max(1, view.scale * 0.8);
      pen.setLineDash(link.state === "bad" ? [7, 6] : []);
      const bend = this.bend(a, b);
      pen.beginPath();
      pen.moveTo(a.x, a.y);
      pen.quadraticCurveTo(bend.x, bend.y, b.x, b.y);
      pen.stroke();
      this.drawn.push({ link, a, b, bend });
      if (!this.dense && (rank >= 1 || this.picture.links.length <= 10)) this.figures(pen, link, a, b, bend, colour);
    }
    pen.globalAlpha = 1;
  }

  bend(a, b) { // towards the middle, so that links along the rim don't run through the hosts between
    const pull = this.dense ? 0.28 : 0.12;
    return { x: ((a.x + b.x) / 2) * (1 - pull), y: ((a.y + b.y) / 2) * (1 - pull) };
  }

  figures(pen, link, a, b, bend, colour) {
    const { rtt, loss, flow } = linkFigures(link);
    const asked = link.state === "bad" && rtt === null ? "no answer" : rtt === null ? "" : milliseconds(rtt) + (loss > 0 ? `  ${percent(loss)} lost` : "");
    const words = [asked, flow ? rate(flow) : ""].filter(Boolean).join("  ");
    if (!words) return;
    const x = (a.x + 2 * bend.x + b.x) / 4, y = (a.y + 2 * bend.y + b.y) / 4;
    pen.globalAlpha = pen.globalAlpha < 0.1 ? pen.globalAlpha : 1;
    pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    pen.setLineDash([]);
    const half = pen.measureText(words).width / 2 + 8;
    pen.fillStyle = colour("card");
    pen.strokeStyle = link.state === "ok" ? colour("line") : colour(link.state);
    pen.lineWidth = 1;
    pen.beginPath();
    pen.roundRect(x - half, y - 11, 2 * half, 22, 11);
    pen.fill();
    pen.stroke();
    pen.fillStyle = link.state === "ok" ? colour("ink") : colour(link.state);
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(words, x, y + 0.5);
  }

  linkAt(clientX, clientY) {
    const box = this.svg.getBoundingClientRect(), view = this.transform();
    const x = (clientX - box.left - view.x) / view.scale, y = (clientY - box.top - view.y) / view.scale;
    let best = null, least = 8 / view.scale;
    for (const { link, a, b, bend } of this.drawn ?? []) {
      for (let step = 0; step <= 24; step++) {
        const t = step / 24, u = 1 - t;
        const distance = Math.hypot(u * u * a.x + 2 * u * t * bend.x + t * t * b.x - x, u * u * a.y + 2 * u * t * bend.y + t * t * b.y - y);
        if (distance < least) (least = distance, best = link);
      }
    }
    return best;
  }

  zoom(factor, x = this.svg.clientWidth / 2, y = this.svg.clientHeight / 2) {
    const { scale, x: left, y: top } = this.transform();
    const next = Math.min(8, Math.max(0.1, scale * factor));
    this.view = { scale: next, x: x - ((x - left) / scale) * next, y: y - ((y - top) / scale) * next };
    this.draw();
  }

  focus(id) {
    this.nodes.get(this.focused)?.setAttribute("tabindex", "-1");
    this.focused = id;
    const node = this.nodes.get(id);
    node?.setAttribute("tabindex", "0");
    node?.focus({ preventScroll: true });
  }

  step(id, dx, dy) { // the nearest host in that direction
    const from = this.places.get(id);
    let best = null, least = Infinity;
    for (const [other, place] of this.places) {
      const along = (place.x - from.x) * dx + (place.y - from.y) * dy;
      const aside = Math.abs((place.x - from.x) * dy) + Math.abs((place.y - from.y) * dx);
      if (other === id || along <= 0.5 || aside > along * 2.5) continue;
      const cost = along + aside * 1.5;
      if (cost < least) (least = cost, best = other);
    }
    if (best) this.focus(best);
  }

  listen() {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const idOf = (event) => event.target.closest?.(".node")?.dataset.id;
    this.svg.addEventListener("keydown", (event) => {
      const id = idOf(event);
      if (!id) return;
      if (arrows[event.key]) this.step(id, ...arrows[event.key]);
      else if (event.key === "Enter" || event.key === " ") this.onSelect({ kind: "host", id }, { keyboard: true });
      else if (event.key === "Home") this.focus(this.picture.hosts[0].id);
      else if (event.key === "End") this.focus(this.picture.hosts.at(-1).id);
      else return;
      event.preventDefault();
    });
    let drag = null;
    this.svg.addEventListener("pointerdown", (event) => {
      const view = this.transform();
      drag = { x: event.clientX, y: event.clientY, view: { ...view }, moved: false, id: idOf(event) };
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (drag) {
        const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
        if (!drag.moved && Math.hypot(dx, dy) < 4) return;
        drag.moved = true;
        this.view = { ...drag.view, x: drag.view.x + dx, y: drag.view.y + dy };
        this.draw();
        return;
      }
      const hovered = idOf(event) ?? null;
      if (hovered !== this.hovered) (this.hovered = hovered, this.draw());
      this.svg.style.cursor = hovered || this.linkAt(event.clientX, event.clientY) ? "pointer" : "";
    });
    this.svg.addEventListener("pointerup", (event) => {
      const { moved, id } = drag ?? { moved: true };
      drag = null;
      if (moved) return;
      const link = id ? null : this.linkAt(event.clientX, event.clientY);
      if (id) (this.focus(id), this.onSelect({ kind: "host", id }));
      else this.onSelect(link ? { kind: "link", id: linkId(link) } : null);
    });
    this.svg.addEventListener("pointerleave", () => { if (this.hovered) (this.hovered = null, this.draw()); });
    this.svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = this.svg.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    document.getElementById("closer").addEventListener("click", () => this.zoom(1.4));
    document.getElementById("farther").addEventListener("click", () => this.zoom(1 / 1.4));
    document.getElementById("whole").addEventListener("click", () => { this.view = null; this.draw(); });
  }
}
