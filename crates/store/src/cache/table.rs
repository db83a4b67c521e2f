//! Finding slots by the hash of their chunk: open addressing with four bytes per cell.
//!
//! Chunk hashes are uniform already, so their leading bytes serve as the position. The table holds only
//! slot numbers; the names are compared in the slots themselves.

use super::set::SlotId;

const VACANT: u32 = u32::MAX;
const CELLS_MIN: usize = 16;

pub(super) struct Table {
    /// A power of two; at most 7/8 in use.
    cells: Vec<u32>,
    len: usize,
}

impl Table {
    pub(super) fn new() -> Table {
        Table { cells: vec![VACANT; CELLS_MIN], len: 0 }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The slot under `prefix` for which `is_it` holds.
    pub(super) fn find(&self, prefix: u64, is_it: impl Fn(SlotId) -> bool) -> Option<SlotId> {
        self.cell_of(prefix, is_it).map(|cell| SlotId(self.cells[cell]))
    }

    /// Adds a slot that is not in the table.
    pub(super) fn insert(&mut self, prefix: u64, id: SlotId, prefix_of: impl Fn(SlotId) -> u64) {
        if (self.len + 1) * 8 > self.cells.len() * 7 {
            let cells = vec![VACANT; self.cells.len() * 2];
            for cell in std::mem::replace(&mut self.cells, cells) {
                if cell != VACANT {
                    self.place(prefix_of(SlotId(cell)), cell);
                }
            }
        }
        self.place(prefix, id.0);
        self.len += 1;
    }

    /// Takes a slot out, if it is in the table.
    pub(super) fn remove(&mut self, prefix: u64, id: SlotId, prefix_of: impl Fn(SlotId) -> u64) {
        let Some(mut hole) = self.cell_of(prefix, |other| other == id) else { return };
        self.len -= 1;
        // Whoever stands behind the hole and would rather stand in it moves up, so that no search that
        // passed the removed slot ends early.
        let mask = self.cells.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let cell = self.cells[at];
            if cell == VACANT {
                break;
            }
            let home = prefix_of(SlotId(cell)) as usize & mask;
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                self.cells[hole] = cell;
                hole = at;
            }
        }
        self.cells[hole] = VACANT;
    }

    fn cell_of(&self, prefix: u64, is_it: impl Fn(SlotId) -> bool) -> Option<usize> {
        let mask = self.cells.len() - 1;
        let mut at = prefix as usize & mask;
        while self.cells[at] != VACANT {
            if is_it(SlotId(self.cells[at])) {
                return Some(at);
            }
            at = (at + 1) & mask;
        }
        None
    }

    fn place(&mut self, prefix: u64, cell: u32) {
        let mask = self.cells.len() - 1;
        let mut at = prefix as usize & mask;
        while self.cells[at] != VACANT {
            at = (at + 1) & mask;
        }
        self.cells[at] = cell;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn the_table_agrees_with_a_set_under_many_collisions(
            steps in prop::collection::vec((0u32..200, prop::bool::weighted(0.6)), 0..600),
            spread in 1u64..40,
        ) {
            let prefix_of = |id: SlotId| u64::from(id.0) % spread;
            let mut table = Table::new();
            let mut set = BTreeSet::new();
            for (id, is_insert) in steps {
                if is_insert && set.insert(id) {
                    table.insert(prefix_of(SlotId(id)), SlotId(id), prefix_of);
                } else if !is_insert {
                    set.remove(&id);
                    table.remove(prefix_of(SlotId(id)), SlotId(id), prefix_of);
                }
                for id in 0..200 {
                    let found = table.find(prefix_of(SlotId(id)), |other| other == SlotId(id));
                    prop_assert_eq!(found.is_some(), set.contains(&id), "slot {}", id);
                }
                prop_assert_eq!(table.len(), set.len());
            }
        }
    }
}
