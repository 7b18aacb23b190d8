/* One instruction set's instance of the vector kernels; the build names it with -DLEVEL. */
#include "attention.c"
#include "checksum.c"
#include "linear.c"
#include "rows.c"

void NAME(isthmus_fill)(kernel_table *table) {
    NAME(isthmus_fill_rows)(table);
    NAME(isthmus_fill_linear)(table);
    NAME(isthmus_fill_attention)(table);
    NAME(isthmus_fill_checksum)(table);
}
