/* iovecs that a socket call may move in part: what is left of them after each call. */

#include "native.h"

#include <errno.h>
#include <sys/socket.h>

struct cursor cursor_over(struct iovec *runs, size_t count, uint64_t bytes)
{
    return (struct cursor){runs, count, bytes};
}

void fill_runs(struct iovec *into, const uint64_t *addresses, const uint64_t *lengths, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        into[i].iov_base = (void *)(uintptr_t)addresses[i];
        into[i].iov_len = lengths[i];
    }
}

struct cursor ask(struct iovec *parts, struct request *request, const struct slice *slice)
{
    static const uint8_t filling[ALIGN];
    size_t count = 0, table = slice->count * sizeof *slice->remote;
    *request = (struct request){.op = slice->op,
                                .grant_bytes = slice->grant_bytes,
                                .runs = slice->count,
                                .nbytes = slice->nbytes,
                                .request_id = request->request_id + 1};
    size_t body = body_bytes(request), fill = body - 2 * table - slice->grant_bytes;
    parts[count++] = (struct iovec){request, HEADER_BYTES};
    parts[count++] = (struct iovec){(void *)slice->remote, table};
    parts[count++] = (struct iovec){(void *)slice->lengths, table};
    if (slice->grant_bytes)
        parts[count++] = (struct iovec){(void *)slice->grant, slice->grant_bytes};
    if (fill)
        parts[count++] = (struct iovec){(void *)filling, fill};
    uint64_t bytes = HEADER_BYTES + body;
    if (slice->op == WRITE) {
        fill_runs(parts + count, slice->local, slice->lengths, slice->count);
        count += slice->count;
        bytes += slice->nbytes;
    }
    return cursor_over(parts, count, bytes);
}

static void advance(struct cursor *cursor, size_t moved)
{
    cursor->left -= moved;
    while (moved && moved >= cursor->at->iov_len) {
        moved -= cursor->at->iov_len;
        cursor->at++;
        cursor->count--;
    }
    if (moved) {
        cursor->at->iov_base = (char *)cursor->at->iov_base + moved;
        cursor->at->iov_len -= moved;
    }
}

static struct msghdr message_of(const struct cursor *cursor)
{
    size_t count = cursor->count < MOST_RUNS ? cursor->count : MOST_RUNS;
    return (struct msghdr){.msg_iov = cursor->at, .msg_iovlen = count};
}

int64_t receive_once(int fd, struct cursor *into, int flags)
{
    struct msghdr message = message_of(into);
    ssize_t moved = recvmsg(fd, &message, flags);
    if (moved < 0)
        return -errno;
    advance(into, moved);
    return moved;
}

int64_t send_once(int fd, struct cursor *from, int flags)
{
    struct msghdr message = message_of(from);
    ssize_t moved = sendmsg(fd, &message, MSG_NOSIGNAL | flags);
    if (moved < 0)
        return -errno;
    advance(from, moved);
    return moved;
}
