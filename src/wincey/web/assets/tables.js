// The same as tables, for those who rather read, and for screen readers. Rows are kept over a refresh, and with them the focus.

import { RANK, badge, element, linkFigures, linkId, milliseconds, percent, rate, traffic } from "./text.js";

const sum = (host) => { const flow = traffic(host); return flow ? flow.receive + flow.send : -1; };

const HOSTS = [
  ["State", (host) => badge(host.state), (host) => RANK[host.state]],
  ["Host", (host) => host.name],
  ["Address", (host) => host.public.join(", ")],
  ["Subnet", (host) => host.subnets.join(", "), null],
  ["Backend", (host) => host.backend],
  ["Received", (host) => rate(traffic(host)?.receive), sum, "number"],
  ["Sent", (host) => rate(traffic(host)?.send), sum, "number"],
  ["Containers", (host) => (host.state === "lease" ? "–" : String(host.containers.length)), (host) => host.containers.length, "number"],
  ["Note", (host) => host.troubles[0] ?? host.told, null, "wrap"],
];

const LINKS = (names) => [
  ["State", (link) => badge(link.state), (link) => RANK[link.state]],
  ["Between", (link) => names.get(link.a)],
  ["and", (link) => names.get(link.b)],
  ["Encapsulation", (link) => link.backend],
  ["Round trip", (link) => milliseconds(linkFigures(link).rtt), (link) => linkFigures(link).rtt ?? -1, "number"],
  ["Lost", (link) => percent(linkFigures(link).loss), (link) => linkFigures(link).loss ?? -1, "number"],
  ["Traffic", (link) => rate(linkFigures(link).flow), (link) => linkFigures(link).flow ?? -1, "number"],
  ["MTU", (link) => String(linkFigures(link).mtu ?? "–"), (link) => linkFigures(link).mtu ?? 0, "number"],
  ["Note", (link) => link.ways.flatMap((way) => way.troubles)[0] ?? "", null, "wrap"],
];

export class Tables {
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.box = document.getElementById("table");
    this.order = { hosts: null, links: null };
  }

  update(kind, picture, selection, matching) {
    const names = new Map(picture.hosts.map((host) => [host.id, host.name]));
    const columns = kind === "hosts" ? HOSTS : LINKS(names);
    const idOf = kind === "hosts" ? (host) => host.id : linkId;
    let items = kind === "hosts" ? picture.hosts : picture.links;
    if (matching) items = items.filter((item) => (kind === "hosts" ? matching.has(item.id) : matching.has(item.a) || matching.has(item.b)));
    const order = this.order[kind];
    if (order) {
      const [, show, value] = columns[order.column];
      const key = value ?? show;
      const sign = order.down ? -1 : 1;
      items = [...items].sort((a, b) => sign * (typeof key(a) === "number" ? key(a) - key(b) : String(key(a)).localeCompare(String(key(b)), "en", { numeric: true })));
    }
    const focused = this.box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const top = this.box.scrollTop;
    const sort = (column) => { this.order[kind] = { column, down: this.order[kind]?.column === column && !this.order[kind].down }; this.update(kind, picture, selection, matching); };
    const head = columns.map(([name, , , style], column) => element("th", { class: style, scope: "col", "aria-sort": order?.column === column ? (order.down ? "descending" : "ascending") : "none" },
      element("button", { "data-key": `head ${column}`, onclick: () => sort(column) }, name + (order?.column === column ? (order.down ? " ↓" : " ↑") : ""))));
    const rows = items.map((item) => {
      const id = idOf(item);
      const chosen = selection?.id === id;
      const choose = (keyboard) => this.onSelect({ kind: kind === "hosts" ? "host" : "link", id }, { keyboard });
      return element("tr", {
        tabindex: "0", "data-key": id, class: chosen && "chosen", "aria-selected": String(chosen), onclick: () => choose(false),
        onkeydown: (event) => {
          if (event.key === "Enter") choose(true);
          else if (event.key === "ArrowDown") event.currentTarget.nextElementSibling?.focus();
          else if (event.key === "ArrowUp") event.currentTarget.previousElementSibling?.focus();
          else return;
          event.preventDefault();
        },
      }, columns.map(([, show, , style]) => element("td", { class: style }, show(item))));
    });
    this.box.replaceChildren(element("table", { "aria-label": kind === "hosts" ? "Hosts" : "Links" }, element("thead", {}, element("tr", {}, head)), element("tbody", {}, rows)));
    this.box.scrollTop = top;
    if (focused) this.box.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }
}
