/* Looking for bytes for a moment before sleeping until they come.
 *
 * To be woken costs 21 us a round trip on a virtual machine, to look all the time 7.5 us. But who
 * looks takes a core from somebody: so it is brief, and after each try that found nothing twice as
 * many chances are left out. Where others want the cores it does not pay: no core is idle then, so
 * to be woken costs little, and who sleeps is let in at once when there is something to do; who
 * looked has used up his share and waits for milliseconds. */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    JUDGED = 64,         /* looks, 2 ms of them: so often the thread asks if it had to wait */
    LEAST_WARY = 256,    /* chances left out after it had to */
    MOST_WARY = 8192,
    MOST_LEFT_OUT = 256, /* chances: beside a slow peer, 0.2 us each of a wait of 50 or more */
};

static void found_nothing(struct spin *spin)
{
    spin->step = spin->step ? spin->step * 2 : 1;
    if (spin->step > MOST_LEFT_OUT)
        spin->step = MOST_LEFT_OUT;
    spin->skip = spin->step;
}

/* Nanoseconds that this thread was ready to run and did not; 0 on a kernel that does not tell. */
static int64_t waited_ns(void)
{
    char text[64] = "";
    int fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    char *second = size > 0 ? strchr(text, ' ') : NULL;
    return second ? strtoll(second, NULL, 10) : 0;
}

/* Of the time since it was last asked, by this thread, more than a quarter went by waiting. */
static bool has_waited(void)
{
    static __thread int64_t last_at, last_waited;
    int64_t at = now_ns(), waited = waited_ns();
    bool much = waited - last_waited > (at - last_at) / 4;
    last_at = at;
    last_waited = waited;
    return much;
}

/* Cores that are wanted now are so for long: forget it slowly. */
static void was_taken(struct spin *spin)
{
    spin->wary = spin->wary < LEAST_WARY ? LEAST_WARY : spin->wary * 4;
    if (spin->wary > MOST_WARY)
        spin->wary = MOST_WARY;
    spin->skip = spin->wary;
    spin->looks = 0;
}

/* Is a core to be had? The first look after a while only begins to count. */
static bool may_look(struct spin *spin)
{
    if (spin->looks++ % JUDGED)
        return true;
    bool crowded = has_waited();
    if (spin->looks == 1)
        return true;
    if (crowded)
        was_taken(spin);
    else
        spin->wary /= 2;
    return !crowded;
}

int64_t receive_spinning(int fd, struct cursor *into, struct spin *spin, int64_t *budget)
{
    int64_t moved = receive_once(fd, into, MSG_DONTWAIT);
    if (moved != -EAGAIN)
        return moved;
    if (spin->skip) {
        spin->skip--;
        return -EAGAIN;
    }
    if (!may_look(spin))
        return -EAGAIN;
    int64_t began = now_ns();
    for (;;) {
        moved = receive_once(fd, into, MSG_DONTWAIT);
        int64_t looked = now_ns() - began;
        bool found = moved != -EAGAIN, late = looked >= *budget;
        if (found || late) {
            *budget = late ? 0 : *budget - looked;
            if (found)
                spin->step = 0;
            else
                found_nothing(spin);
            return moved;
        }
    }
}
