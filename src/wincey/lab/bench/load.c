/* What `wincey bench data` loads a path with. Each prints one line of JSON about what it saw, and ends by itself.
 *
 *     load tcp-sink PORT                        take every connection, until a client says how it is over
 *     load tcp ADDRESS PORT SECONDS STREAMS     send as fast as it goes over so many connections
 *     load rr-server PORT                       send each byte back
 *     load rr ADDRESS PORT SECONDS              one byte there and one back, one after the other
 *     load udp-sink PORT SECONDS                count datagrams, from the first one on
 *     load udp ADDRESS PORT SECONDS             send datagrams of 18 bytes (frames of 64) as fast as it goes
 *
 * Sinks and servers print "ready" when they listen. What arrives in the first WARM_UP seconds is not counted.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef WARM_UP
#define WARM_UP 0.2
#endif
#define BLOCK (128 * 1024) /* as iperf3 writes */
#define PAYLOAD 18
#define BATCH 64
#define PATIENCE 5 /* seconds until a sink gives up */
#define PAUSE_US 50
#define ANSWER 0.01 /* seconds between two answers of a sink */
#define MOST_STREAMS 64
#define MOST_SAMPLES (1 << 22)

static char block[BLOCK];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void ready(void)
{
    puts("ready");
    fflush(stdout);
}

static struct sockaddr_in address(const char *text, const char *port)
{
    return (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons(atoi(port)), .sin_addr.s_addr = text ? inet_addr(text) : INADDR_ANY};
}

static int listening(int type, const char *port)
{
    struct sockaddr_in own = address(NULL, port);
    int sock = socket(AF_INET, type, 0), on = 1;

    setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (sock < 0 || bind(sock, (struct sockaddr *)&own, sizeof own)) fail("bind");
    if (type == SOCK_STREAM && listen(sock, MOST_STREAMS)) fail("listen");
    return sock;
}

static int connected(int type, const char *to, const char *port)
{
    struct sockaddr_in other = address(to, port);
    int sock = socket(AF_INET, type, 0), on = 1;

    if (sock < 0 || connect(sock, (struct sockaddr *)&other, sizeof other)) fail("connect");
    if (type == SOCK_STREAM) setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return sock;
}

/* Read all connections to their end; count what came between the end of the warm-up and the first end of one. */
static void tcp_sink(const char *port)
{
    struct pollfd all[MOST_STREAMS + 1] = {{listening(SOCK_STREAM, port), POLLIN, 0}};
    int count = 1, ended = 0;
    double first = 0, start = 0, last = 0;
    uint64_t total = 0, at_start = 0, at_last = 0;

    ready();
    while (count == 1 || ended < count - 1) {
        if (poll(all, count, 20000) <= 0) fail("tcp-sink: nothing comes");
        if (all[0].revents && count <= MOST_STREAMS) {
            all[count++] = (struct pollfd){accept(all[0].fd, NULL, NULL), POLLIN, 0};
            if (!first) first = now();
        }
        for (int i = 1; i < count; i++) {
            if (!all[i].revents) continue;
            ssize_t got = read(all[i].fd, block, BLOCK);
            if (got <= 0) {
                close(all[i].fd);
                all[i] = (struct pollfd){-1, 0, 0};
                ended++;
                continue;
            }
            total += got;
            if (ended) continue;
            last = now();
            at_last = total;
            if (!start && last - first > WARM_UP) {
                start = last;
                at_start = total;
            }
        }
    }
    printf("{\"bytes\": %llu, \"total\": %llu, \"seconds\": %.6f}\n", (unsigned long long)(at_last - at_start),
           (unsigned long long)total, start ? last - start : 0.0);
}

static void tcp_send(const char *to, const char *port, double seconds, int streams)
{
    struct pollfd all[MOST_STREAMS];
    double end;

    if (streams < 1 || streams > MOST_STREAMS) exit(2);
    for (int i = 0; i < streams; i++) all[i] = (struct pollfd){connected(SOCK_STREAM, to, port), POLLOUT, 0};
    end = now() + WARM_UP + seconds;
    while (now() < end) {
        if (poll(all, streams, 1000) < 0) fail("poll");
        for (int i = 0; i < streams; i++)
            if (all[i].revents && send(all[i].fd, block, BLOCK, MSG_DONTWAIT) < 0 && errno != EAGAIN) fail("send");
    }
    puts("{}");
}

static void rr_server(const char *port)
{
    int listener = listening(SOCK_STREAM, port), on = 1;
    char byte;

    ready();
    int sock = accept(listener, NULL, NULL);
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    while (read(sock, &byte, 1) == 1)
        if (write(sock, &byte, 1) != 1) break;
    puts("{}");
}

static int by_size(const void *one, const void *other)
{
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

static void rr(const char *to, const char *port, double seconds)
{
    float *samples = calloc(MOST_SAMPLES, sizeof *samples);
    int sock = connected(SOCK_STREAM, to, port), count = 0;
    double begin = now(), start = 0, last = begin;
    char byte = 'x';

    while (last < begin + WARM_UP + seconds && count < MOST_SAMPLES) {
        if (write(sock, &byte, 1) != 1 || read(sock, &byte, 1) != 1) fail("rr");
        double time = now();
        if (start)
            samples[count++] = time - last;
        else if (time > begin + WARM_UP)
            start = time;
        last = time;
    }
    qsort(samples, count, sizeof *samples, by_size);
    printf("{\"transactions\": %d, \"seconds\": %.6f, \"p50_us\": %.2f, \"p99_us\": %.2f}\n", count, last - start,
           count ? samples[count / 2] * 1e6 : 0, count ? samples[(int)(count * .99)] * 1e6 : 0);
}

/* Nobody wakes this sink: it looks now and then. To wake a process on another core costs a virtual machine's sender more
 * than the whole path does, for every datagram; and a sink that spins would take the core from the hosts' programs. */
static void udp_sink(const char *port, double seconds)
{
    static char payloads[BATCH][2048];
    struct mmsghdr messages[BATCH] = {0};
    struct iovec parts[BATCH];
    struct sockaddr_in sender;
    int sock = listening(SOCK_DGRAM, port), room = 8 << 20;
    double start = 0, last = now(), first = 0, answered = 0;
    uint64_t count = 0;

    setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    for (int i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){payloads[i], sizeof payloads[i]};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
    }
    messages[0].msg_hdr.msg_name = &sender;
    messages[0].msg_hdr.msg_namelen = sizeof sender;
    ready();
    while (!start || last < start + seconds) {
        int got = recvmmsg(sock, messages, BATCH, MSG_DONTWAIT, NULL);
        if (got <= 0) {
            if (now() > last + PATIENCE) break;
            usleep(PAUSE_US);
            continue;
        }
        last = now();
        if (!first) first = last;
        if (last > answered + ANSWER) {
            /* As most of what is sent over UDP gets answers: to conntrack the flow is established from the first one on that
             * is not lost. */
            sendto(sock, "", 1, 0, (struct sockaddr *)&sender, sizeof sender);
            answered = last;
        }
        if (start)
            count += got;
        else if (last > first + WARM_UP)
            start = last;
    }
    printf("{\"packets\": %llu, \"seconds\": %.6f}\n", (unsigned long long)count, start ? last - start : 0.0);
}

static void udp_send(const char *to, const char *port, double seconds)
{
    static char payload[PAYLOAD];
    struct iovec part = {payload, sizeof payload};
    struct mmsghdr messages[BATCH] = {0};
    int sock = connected(SOCK_DGRAM, to, port);
    double end = now() + WARM_UP + seconds;
    uint64_t sent = 0;

    for (int i = 0; i < BATCH; i++) messages[i].msg_hdr = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
    while (now() < end) {
        int done = sendmmsg(sock, messages, BATCH, 0);
        if (done > 0)
            sent += done;
        else if (errno != ECONNREFUSED && errno != ENOBUFS) /* the sink has had enough; a queue is full */
            fail("sendmmsg");
    }
    printf("{\"sent\": %llu}\n", (unsigned long long)sent);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";

    alarm(60); /* whatever happens */
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(what, "tcp-sink") && argc == 3)
        tcp_sink(argv[2]);
    else if (!strcmp(what, "tcp") && argc == 6)
        tcp_send(argv[2], argv[3], atof(argv[4]), atoi(argv[5]));
    else if (!strcmp(what, "rr-server") && argc == 3)
        rr_server(argv[2]);
    else if (!strcmp(what, "rr") && argc == 5)
        rr(argv[2], argv[3], atof(argv[4]));
    else if (!strcmp(what, "udp-sink") && argc == 4)
        udp_sink(argv[2], atof(argv[3]));
    else if (!strcmp(what, "udp") && argc == 5)
        udp_send(argv[2], argv[3], atof(argv[4]));
    else {
        fprintf(stderr, "usage: see the head of load.c\n");
        return 2;
    }
    return 0;
}
