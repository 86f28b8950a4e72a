/* Looking for bytes for a moment before sleeping until they come.
 *
 * To be woken costs 21 us a round trip on a virtual machine, to look all the time 7.5 us. But who
 * looks takes a core from somebody, so it is brief, it stops where the core was taken away (others
 * want it), and after each try that found nothing twice as many chances are left out. */

#include "native.h"

#include <errno.h>
#include <sys/socket.h>

enum {
    ABSENT_NS = 20000,    /* between two looks, each under 1 us: we were off the core */
    MOST_LEFT_OUT = 256,  /* chances: beside a slow peer, 0.2 us each of a wait of 50 or more */
};

static void wasted(struct spin *spin)
{
    spin->step = spin->step ? spin->step * 2 : 1;
    if (spin->step > MOST_LEFT_OUT)
        spin->step = MOST_LEFT_OUT;
    spin->skip = spin->step;
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
    int64_t began = now_ns(), last = began;
    for (;;) {
        moved = receive_once(fd, into, MSG_DONTWAIT);
        int64_t now = now_ns();
        if (moved != -EAGAIN) {
            *budget -= now - began;
            spin->step = 0;
            return moved;
        }
        if (now - began >= *budget || now - last >= ABSENT_NS) {
            *budget = 0;
            wasted(spin);
            return -EAGAIN;
        }
        last = now;
    }
}
