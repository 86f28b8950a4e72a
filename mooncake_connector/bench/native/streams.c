/* What TCP transfers cannot beat: both ends know the list of runs, so a run is one short request
 * and the bytes. A read's last byte is its end; a write is acknowledged. Sockets block. */
#define _GNU_SOURCE
#include "limits.h"

#include <errno.h>
#include <sched.h>
#include <sys/socket.h>
#include <time.h>

enum { RUNS_PER_CALL = 1024 }; /* the kernel's UIO_MAXIOV */

/* One connection's part, at either end. runs[0] is the word that asks or acknowledges. */
struct stream {
    struct iovec *runs;
    size_t count; /* without runs[0] */
    int32_t fd;
    int32_t write;
    int64_t spin_ns; /* how long to look for bytes before waiting for them; 0: wait at once */
};

static int64_t now_ns(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

/* A blocking wait costs a sleeping and a waking processor, 10 us here; a look costs 0.3 us. */
static void spin(const struct stream *stream)
{
    if (!stream->spin_ns)
        return;
    int64_t until = now_ns() + stream->spin_ns;
    char byte;
    while (recv(stream->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN) {
        if (now_ns() > until)
            return;
        sched_yield(); /* the other end may be waiting for this very processor */
    }
}

static ssize_t call(int fd, struct iovec *runs, size_t count, int sending)
{
    struct msghdr message = {.msg_iov = runs,
                             .msg_iovlen = count < RUNS_PER_CALL ? count : RUNS_PER_CALL};
    ssize_t moved;
    do
        moved = sending ? sendmsg(fd, &message, MSG_NOSIGNAL)
                        : recvmsg(fd, &message, MSG_WAITALL);
    while (moved < 0 && errno == EINTR);
    if (moved < 0)
        return -errno;
    return moved ? moved : -EPIPE; /* the other end closed */
}

/* All bytes of `runs`, or a negative errno. `runs` is as before on return. */
static int move(int fd, struct iovec *runs, size_t count, int sending)
{
    size_t at = 0;
    while (at < count) {
        ssize_t moved = call(fd, runs + at, count - at, sending);
        if (moved < 0)
            return (int)moved;
        while (at < count && (size_t)moved >= runs[at].iov_len)
            moved -= (ssize_t)runs[at++].iov_len;
        if (!moved)
            continue;
        struct iovec rest = {(char *)runs[at].iov_base + moved, runs[at].iov_len - (size_t)moved};
        while (rest.iov_len) { /* a signal cut a run: first the rest of that one */
            moved = call(fd, &rest, 1, sending);
            if (moved < 0)
                return (int)moved;
            rest.iov_base = (char *)rest.iov_base + moved;
            rest.iov_len -= (size_t)moved;
        }
        at++;
    }
    return 0;
}

/* The initiator's half of one run. */
int limits_ask(void *part)
{
    struct stream *stream = part;
    int result = move(stream->fd, stream->runs, stream->write ? stream->count + 1 : 1, 1);
    if (result)
        return result;
    spin(stream);
    if (stream->write)
        return move(stream->fd, stream->runs, 1, 0);
    return move(stream->fd, stream->runs + 1, stream->count, 0);
}

/* The target's half of all runs, until the initiator leaves: 0 when that was between two runs. */
int limits_serve(struct stream *stream)
{
    for (;;) {
        spin(stream);
        int result = move(stream->fd, stream->runs, 1, 0);
        if (result)
            return result == -EPIPE ? 0 : result;
        if (stream->write) {
            result = move(stream->fd, stream->runs + 1, stream->count, 0);
            if (!result)
                result = move(stream->fd, stream->runs, 1, 1);
        } else {
            result = move(stream->fd, stream->runs + 1, stream->count, 1);
        }
        if (result)
            return result;
    }
}
