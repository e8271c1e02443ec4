/* From the device to the socket, a batch at most in a call; see core.h.
 *
 * What is dropped is counted by reason; no error of a send ends anything: the tunnel is a link, and links drop. A packet that nobody has
 * is kept for Python to answer, which is why the loop returns.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <netinet/udp.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103		/* include/uapi/linux/udp.h */
#endif

static void sent(struct core *core, const struct train *train)
{
	core->counters[OUT_PACKETS] += train->segments;
	core->counters[OUT_BYTES] += train->bytes;
	core->counters[OUT_SENDS]++;
}

/* A train that the kernel refused, one datagram for each segment. */
static void send_singly(struct core *core, const struct train *train, struct sockaddr_in *to, int udp)
{
	struct iovec *iov = &core->out.iov[train->first];

	for (unsigned i = 0; i < train->segments; iov += train->parts[i++]) {
		struct msghdr message = {.msg_name = to, .msg_namelen = sizeof *to, .msg_iov = iov, .msg_iovlen = train->parts[i]};
		ssize_t length = sendmsg(udp, &message, MSG_DONTWAIT);

		if (length < 0) {
			failed(core, OUT_DROP, errno, 1);
			continue;
		}
		core->counters[OUT_PACKETS]++;
		core->counters[OUT_BYTES] += (uint64_t)length;
		core->counters[OUT_SENDS]++;
	}
}

/* Send all trains that are ready, and empty `out`. */
static void send_trains(struct core *core, int udp)
{
	struct out *out = &core->out;
	struct mmsghdr messages[TRAINS];
	struct sockaddr_in to[TRAINS];
	union { char space[CMSG_SPACE(sizeof(uint16_t))]; struct cmsghdr align; } control[TRAINS];
	unsigned i;

	if (out->iovs == 1) {	/* one packet alone: the cheapest call */
		to[0] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = core->port,
					     .sin_addr.s_addr = out->train[0].to->address};
		if (sendto(udp, out->iov[0].iov_base, out->iov[0].iov_len, MSG_DONTWAIT, (void *)&to[0], sizeof to[0]) < 0)
			failed(core, OUT_DROP, errno, 1);
		else
			sent(core, &out->train[0]);
		out->trains = out->iovs = out->segments = 0;
		return;
	}
	for (i = 0; i < out->trains; i++) {
		struct train *train = &out->train[i];
		struct msghdr *message = &messages[i].msg_hdr;

		to[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = core->port, .sin_addr.s_addr = train->to->address};
		*message = (struct msghdr){.msg_name = &to[i], .msg_namelen = sizeof to[i],
					   .msg_iov = &out->iov[train->first], .msg_iovlen = train->iovs};
		if (train->segments > 1) {
			uint16_t size = (uint16_t)train->size;
			struct cmsghdr *header;

			memset(&control[i], 0, sizeof control[i]);
			message->msg_control = &control[i];
			message->msg_controllen = sizeof control[i].space;
			header = CMSG_FIRSTHDR(message);
			header->cmsg_level = IPPROTO_UDP;
			header->cmsg_type = UDP_SEGMENT;
			header->cmsg_len = CMSG_LEN(sizeof size);
			memcpy(CMSG_DATA(header), &size, sizeof size);
		}
	}
	for (i = 0; i < out->trains;) {
		int done = sendmmsg(udp, &messages[i], out->trains - i, MSG_DONTWAIT);
		int error = errno;
		struct train *train = &out->train[i];

		if (done > 0) {
			for (; done; done--)
				sent(core, &out->train[i++]);
			continue;
		}
		if (done < 0 && error == EINTR)
			continue;
		if (train->segments > 1 && (error == EIO || error == EINVAL || error == EMSGSIZE)) {
			if (error == EIO)
				core->trains = 0;	/* a device, or an IPsec policy, that can't have it at all */
			else
				train->to->limit = train->size - 1;	/* larger than the way there takes in one piece */
			send_singly(core, train, &to[i], udp);
		} else {
			failed(core, OUT_DROP, error, train->segments);
		}
		i++;
	}
	out->trains = out->iovs = out->segments = 0;
}

/* One frame from the device. */
static void leave(struct core *core, uint8_t *frame, size_t length, int udp)
{
	struct vnet vnet;
	uint8_t *packet = frame + VNET;
	struct endpoint *to;
	uint32_t destination;
	int wrong;

	if (length < VNET) {
		core->counters[OUT_SHORT]++;
		return;
	}
	length -= VNET;
	memcpy(&vnet, frame, VNET);
	if ((wrong = fault(packet, length)) >= 0) {
		core->counters[OUT_SHORT + wrong]++;
		return;
	}
	memcpy(&destination, packet + 16, 4);
	if (!(to = peers_route(&core->peers, destination))) {
		core->counters[OUT_NO_PEER]++;
		if (!core->refused) {
			core->refused = length < sizeof core->refusal ? (uint32_t)length : sizeof core->refusal;
			memcpy(core->refusal, packet, core->refused);
		}
		return;
	}
	if (vnet.gso_type != GSO_NONE) {
		if (out_large(core, packet, length, &vnet, to, send_trains, udp))
			core->counters[OUT_OFFLOAD]++;
	} else if (vnet.flags & NEEDS_CSUM && finish_checksum(packet, length, &vnet)) {
		core->counters[OUT_OFFLOAD]++;
	} else {
		out_packet(core, packet, length, to, send_trains, udp);
	}
}

/* Send what the device has, at most a batch, and until a packet is to be refused. 0, or -errno when the device is gone. */
EXPORT int wincey_outbound(struct core *core, int tun, int udp)
{
	size_t used = 0;
	uint32_t reads = 0;
	int result = 0;

	while (reads < core->reads && used < FRAMES * (size_t)FRAME && !core->refused) {
		ssize_t length = read(tun, core->arena + used, FRAME);

		if (length <= 0) {
			if (length < 0 && errno != EAGAIN && errno != EINTR)
				result = -errno;
			break;
		}
		leave(core, core->arena + used, (size_t)length, udp);
		used += ((size_t)length + 63) & ~(size_t)63;
		reads++;
	}
	send_trains(core, udp);
	core->streak = reads * 256 > used ? core->streak + reads : 0;
	core->inward = 0;
	core->reads = next_batch(reads, core->reads, READS, core->streak >= STREAK || used > 4096);
	return result;
}
