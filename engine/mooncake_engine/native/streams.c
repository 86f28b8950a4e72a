/* A team over the streams of one peer: each member asks for pieces on a connection of its own, and
 * for the next one before the last has arrived, so that the peer is never without work. */

#include "native.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

struct asked {
    struct piece piece;
    uint64_t request_id;
};

struct stream {
    int fd;
    struct request request;
    struct told told;
    struct iovec one;
    struct asked pieces[2];
    struct iovec iovecs[ASK_PARTS + MOST_RUNS];
};

/* All of it. The socket's time-outs let it look at the clock; it ends LATE. */
static int receive_all(struct team *team, int fd, struct cursor *into)
{
    while (into->left) {
        int64_t moved = receive_once(fd, into, MSG_WAITALL);
        if (moved == 0)
            return ENDED;
        if (moved > 0)
            continue;
        if (moved != -EAGAIN && moved != -EINTR)
            return (int)moved;
        if (team_is_late(team))
            return LATE;
    }
    return DONE;
}

static int send_all(struct team *team, int fd, struct cursor *from)
{
    while (from->left) {
        int64_t moved = send_once(fd, from, 0);
        if (moved >= 0)
            continue;
        if (moved != -EAGAIN && moved != -EINTR)
            return (int)moved;
        if (team_is_late(team))
            return LATE;
    }
    return DONE;
}

static int ask_for(struct team *team, struct stream *stream, struct asked *asked)
{
    struct cursor from = ask(stream->iovecs, &stream->request, &asked->piece.slice);
    asked->request_id = stream->request.request_id;
    return send_all(team, stream->fd, &from);
}

static int take(struct team *team, struct stream *stream, struct asked *asked)
{
    stream->told.request_id = asked->request_id;
    stream->told.reason_bytes = 0;
    stream->one = (struct iovec){&stream->told.answer, ANSWER_BYTES};
    struct cursor into = cursor_over(&stream->one, 1, ANSWER_BYTES);
    int end = receive_all(team, stream->fd, &into);
    if (end != DONE)
        return end;
    if (!says_ok(&stream->told))
        return HANDED;
    const struct slice *slice = &asked->piece.slice;
    if (slice->op == WRITE)
        return DONE;
    fill_runs(stream->iovecs, slice->local, slice->lengths, slice->count);
    into = cursor_over(stream->iovecs, slice->count, slice->nbytes);
    return receive_all(team, stream->fd, &into);
}

static int stream_pieces(struct team *team, void *own)
{
    struct stream *stream = own;
    struct asked *now = &stream->pieces[0], *next = &stream->pieces[1];
    int end = DONE;
    bool more = team_deal(team, &now->piece);
    if (more)
        end = ask_for(team, stream, now);
    while (more && end == DONE) {
        more = team_deal(team, &next->piece);
        if (more)
            end = ask_for(team, stream, next);
        if (end == DONE)
            end = take(team, stream, now);
        struct asked *last = now;
        now = next;
        next = last;
    }
    return end;
}

/* A team over `size` connected and greeted streams. NULL with errno when it cannot be had. */
EXPORT struct team *mooncake_streams_new(const int *fds, size_t size)
{
    void **own = calloc(size, sizeof *own);
    struct team *team = NULL;
    size_t made = 0;
    for (struct stream *stream; own && made < size; own[made++] = stream) {
        stream = calloc(1, sizeof *stream);
        if (!stream)
            break;
        stream->fd = fds[made];
    }
    if (own && made == size)
        team = team_new(stream_pieces, own, size, false);
    while (!team && made)
        free(own[--made]);
    free(own);
    return team;
}

/* What the stream of a member was told when that was HANDED. */
EXPORT const struct told *mooncake_streams_told(struct team *team, size_t member)
{
    return &((struct stream *)team_own(team, member))->told;
}
