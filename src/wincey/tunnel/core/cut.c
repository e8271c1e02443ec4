/* From the device to the underlay: large packets are cut into what they stand for, and all of it is put into trains. */
#include "core.h"

#include <errno.h>

/* Put one packet, in one piece or as headers and payload, at the end of the last train, or into a new one. */
static void add(struct core *core, const struct iovec *piece, uint8_t parts, struct endpoint *to, room *send, int udp)
{
	struct out *out = &core->out;
	uint32_t length = (uint32_t)piece[0].iov_len + (parts > 1 ? (uint32_t)piece[1].iov_len : 0);
	struct train *train = out->trains ? &out->train[out->trains - 1] : NULL;

	if (!train || train->closed || train->to != to || train->segments == TRAIN || length > train->size
	    || train->bytes + length > DATAGRAM) {
		if (out->trains == TRAINS) {	/* the headers of this packet are the last ones made: they must not move */
			uint32_t kept = out->segments;
			send(core, udp);
			out->segments = kept;
		}
		train = &out->train[out->trains++];
		*train = (struct train){.to = to, .size = length, .first = out->iovs};
		train->closed = !core->trains || length > to->limit;
	} else if (length < train->size) {
		train->closed = 1;
	}
	memcpy(&out->iov[out->iovs], piece, parts * sizeof *piece);
	out->iovs += parts;
	train->iovs += parts;
	train->bytes += length;
	train->parts[train->segments++] = parts;
}

static void make_room(struct core *core, room *send, int udp)
{
	if (core->out.segments == SEGMENTS || core->out.iovs + 2 > 2 * SEGMENTS)
		send(core, udp);
}

void out_packet(struct core *core, uint8_t *packet, size_t length, struct endpoint *to, room *send, int udp)
{
	make_room(core, send, udp);
	add(core, &(struct iovec){packet, length}, 1, to, send, udp);
}

/* Finish the checksum that the kernel left to its "hardware". -1 when the header speaks of bytes that are not there. */
int finish_checksum(uint8_t *packet, size_t length, const struct vnet *vnet)
{
	size_t start = vnet->csum_start, field = start + vnet->csum_offset;
	uint16_t value;

	if (field + 2 > length)
		return -1;
	value = (uint16_t)~fold(sum(packet + start, length - start));
	if (!value && packet[9] == IPPROTO_UDP)
		value = 0xffff;		/* 0 says "no checksum" (RFC 768) */
	put_sum(packet + field, value);
	return 0;
}

/* A large packet: TCP, or UDP datagrams of one size. -1 when it is none, or not whole. */
int out_large(struct core *core, uint8_t *packet, size_t length, const struct vnet *vnet, struct endpoint *to, room *send,
	      int udp)
{
	uint32_t ip = (packet[0] & 15u) * 4, header, size = vnet->gso_size, offset, id = get16(packet + 4), sequence = 0;
	int tcp = (vnet->gso_type & ~GSO_ECN) == GSO_TCPV4;
	uint8_t flags = 0;

	if (!size || get16(packet + 6) & 0x3fff)
		return -1;
	if (tcp) {
		if (packet[9] != IPPROTO_TCP || length < ip + 20)
			return -1;
		header = ip + (packet[ip + 12] >> 4) * 4u;
		if (header < ip + 20)
			return -1;
		sequence = get32(packet + ip + 4);
		flags = packet[ip + 13];
	} else {
		if (vnet->gso_type != GSO_UDP_L4 || packet[9] != IPPROTO_UDP)
			return -1;
		header = ip + 8;
	}
	if (length <= header)
		return -1;
	for (offset = header; offset < length; offset += size, sequence += size, id++) {
		uint32_t payload = length - offset < size ? (uint32_t)length - offset : size;
		int last = offset + payload == length;
		uint8_t *made, *check;
		uint16_t value;

		make_room(core, send, udp);
		made = core->out.headers[core->out.segments++];
		memcpy(made, packet, header);
		put16(made + 2, header + payload);
		put16(made + 4, id);
		ip_checksum(made, ip);
		if (tcp) {
			put32(made + ip + 4, sequence);
			/* FIN (1) and PSH (8) belong to the last, CWR (0x80) to the first */
			made[ip + 13] = flags & (uint8_t)~((last ? 0 : 0x09) | (offset == header ? 0 : 0x80));
			check = made + ip + 16;
		} else {
			put16(made + ip + 4, 8 + payload);
			check = made + ip + 6;
		}
		put_sum(check, 0);
		value = (uint16_t)~fold(pseudo(made, header - ip + payload) + sum(made + ip, header - ip)
					+ sum(packet + offset, payload));
		put_sum(check, value || tcp ? value : 0xffff);
		add(core, (struct iovec[]){{made, header}, {packet + offset, payload}}, 2, to, send, udp);
	}
	return 0;
}
