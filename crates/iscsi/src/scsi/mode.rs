//! Mode parameters (SPC-4 §7.5, SBC-3 §6.5): what can be seen, and the two bits that can be changed.

use super::sense::Sense;
use super::{LOGICAL_BLOCK_BYTES, number, truncated};
use crate::limits::PARAMETERS_BYTES_MAX;
use crate::pdu::Cdb;

/// What initiators may change, for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Modes {
    /// The third and fifth byte of the control page, as far as they can be changed.
    control: [u8; 2],
}

/// Which form of MODE SENSE or MODE SELECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Of 6 bytes, with a header of 4.
    Short,
    /// Of 10 bytes, with a header of 8.
    Long,
}

const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const ALL: u8 = 0x3f;

/// The changeable bits of the control page: D_SENSE and SWP.
const CHANGEABLE: [u8; 2] = [0x04, 0x08];

impl Form {
    fn of(cdb: &Cdb) -> Form {
        if cdb[0] >> 5 == 0 { Form::Short } else { Form::Long }
    }

    /// The form and the parameter list's length of a MODE SELECT.
    pub(super) fn of_select(cdb: &Cdb) -> Result<(Form, u64), Sense> {
        const PAGES: u8 = 0x10;
        const SAVE: u8 = 0x01;
        let form = Form::of(cdb);
        if cdb[1] & (PAGES | SAVE) != PAGES {
            return Err(Sense::in_command(1));
        }
        let len = match form {
            Form::Short => cdb[4].into(),
            Form::Long => number(&cdb[7..9]),
        };
        if len > u64::from(PARAMETERS_BYTES_MAX) { Err(Sense::in_command(7)) } else { Ok((form, len)) }
    }

    fn head_bytes(self) -> usize {
        match self {
            Form::Short => 4,
            Form::Long => 8,
        }
    }
}

/// Which values of a page are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Values {
    Current,
    Changeable,
    Default,
}

impl Modes {
    /// Whether sense data comes in descriptor format.
    pub(super) fn descriptor_sense(self) -> bool {
        self.control[0] & CHANGEABLE[0] != 0
    }

    /// Whether an initiator forbade writing.
    pub(super) fn write_protected(self) -> bool {
        self.control[1] & CHANGEABLE[1] != 0
    }

    /// MODE SENSE of a unit of `size` blocks.
    pub(super) fn sense(self, cdb: &Cdb, size: u64, is_protected: bool) -> Result<Vec<u8>, Sense> {
        const NO_DESCRIPTORS: u8 = 0x08;
        const ALL_SUBPAGES: u8 = 0xff;
        let form = Form::of(cdb);
        let values = match cdb[2] >> 6 {
            0 => Values::Current,
            1 => Values::Changeable,
            2 => Values::Default,
            _ => return Err(Sense::NO_SAVING),
        };
        if !matches!(cdb[3], 0 | ALL_SUBPAGES) {
            return Err(Sense::in_command(3));
        }
        let mut pages = Vec::new();
        let wanted = cdb[2] & 0x3f;
        for page in self.pages(values) {
            if wanted == ALL || wanted == page[0] {
                pages.extend_from_slice(&page);
            }
        }
        if pages.is_empty() {
            return Err(Sense::in_command(2));
        }
        let descriptor = if cdb[1] & NO_DESCRIPTORS == 0 { block_descriptor(size) } else { Vec::new() };
        let head = head(form, is_protected, descriptor.len(), pages.len());
        let allocation = match form {
            Form::Short => cdb[4].into(),
            Form::Long => number(&cdb[7..9]),
        };
        Ok(truncated([head, descriptor, pages].concat(), allocation))
    }

    /// MODE SELECT: takes over a whole parameter list, or nothing of it.
    pub(super) fn select(&mut self, form: Form, list: &[u8]) -> Result<(), Sense> {
        if list.is_empty() {
            return Ok(());
        }
        let head_bytes = form.head_bytes();
        let head = list.get(..head_bytes).ok_or(Sense::PARAMETER_LENGTH)?;
        let descriptor_bytes = match form {
            Form::Short => head[3].into(),
            Form::Long => usize::try_from(number(&head[6..8])).expect("two bytes"),
        };
        // A descriptor could only say the sizes that are.
        if !matches!(descriptor_bytes, 0 | 8) {
            return Err(Sense::in_parameters(head_bytes - 1));
        }
        let mut at = head_bytes + descriptor_bytes;
        let mut chosen = *self;
        let now = self.pages(Values::Current);
        while let Some(rest) = list.get(at..).filter(|rest| !rest.is_empty()) {
            let code = rest[0] & 0x3f;
            let page = now.iter().find(|page| page[0] == code && rest[0] & 0x40 == 0);
            let page = page.ok_or(Sense::in_parameters(at))?;
            let given = rest.get(..page.len()).ok_or(Sense::PARAMETER_LENGTH)?;
            for (i, (new, old)) in given.iter().zip(page).enumerate().skip(1) {
                let changeable = match (code, i) {
                    (CONTROL, 2) => CHANGEABLE[0],
                    (CONTROL, 4) => CHANGEABLE[1],
                    _ => 0,
                };
                if (new ^ old) & !changeable != 0 {
                    return Err(Sense::in_parameters(at + i));
                }
            }
            if code == CONTROL {
                chosen.control = [given[2] & CHANGEABLE[0], given[4] & CHANGEABLE[1]];
            }
            at += page.len();
        }
        *self = chosen;
        Ok(())
    }

    /// All pages, in ascending order.
    fn pages(self, values: Values) -> Vec<Vec<u8>> {
        const WRITE_CACHE: u8 = 0x04;
        const ONE_TASK_SET_EACH: u8 = 0x20;
        const ANY_ORDER: u8 = 0x10;
        let page = |code: u8, len: u8| {
            let mut page = vec![0; usize::from(len) + 2];
            (page[0], page[1]) = (code, len);
            page
        };
        let (recovery, mut caching, mut control) = (page(0x01, 10), page(CACHING, 18), page(CONTROL, 10));
        let exceptions = page(0x1c, 10);
        if values != Values::Changeable {
            caching[2] = WRITE_CACHE;
            control[2] = ONE_TASK_SET_EACH;
            control[3] = ANY_ORDER;
        }
        let bits = match values {
            Values::Current => self.control,
            Values::Changeable => CHANGEABLE,
            Values::Default => [0; 2],
        };
        control[2] |= bits[0];
        control[4] |= bits[1];
        vec![recovery, caching, control, exceptions]
    }
}

/// The header: FUA and DPO are known, and whether the unit takes writes.
fn head(form: Form, is_protected: bool, descriptor_bytes: usize, page_bytes: usize) -> Vec<u8> {
    const FUA_AND_DPO: u8 = 0x10;
    let device = FUA_AND_DPO | u8::from(is_protected) << 7;
    let descriptor = u8::try_from(descriptor_bytes).expect("there is at most one descriptor");
    let len = form.head_bytes() + descriptor_bytes + page_bytes;
    match form {
        Form::Short => {
            vec![u8::try_from(len - 1).expect("all pages are short"), 0, device, descriptor]
        }
        Form::Long => {
            let [high, low] = u16::try_from(len - 2).expect("all pages are short").to_be_bytes();
            vec![high, low, 0, device, 0, 0, 0, descriptor]
        }
    }
}

fn block_descriptor(size: u64) -> Vec<u8> {
    let blocks = u32::try_from(size).unwrap_or(u32::MAX);
    [blocks.to_be_bytes(), LOGICAL_BLOCK_BYTES.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sense(modes: Modes, page: u8) -> Result<Vec<u8>, Sense> {
        let mut cdb = [0; 16];
        cdb[..5].copy_from_slice(&[0x1a, 8, page, 0, 255]);
        modes.sense(&cdb, 100, false)
    }

    #[test]
    fn what_was_sensed_can_be_selected_and_changed_bits_are_seen() {
        let mut modes = Modes::default();
        let mut list = sense(modes, CONTROL).unwrap();
        list[0] = 0;
        assert_eq!(modes.select(Form::Short, &list), Ok(()));
        assert_eq!(modes, Modes::default());
        list[4 + 4] |= 0x08;
        modes.select(Form::Short, &list).unwrap();
        assert!(modes.write_protected() && !modes.descriptor_sense());
        list[4 + 2] |= 0x04;
        list[4 + 4] = 0;
        modes.select(Form::Short, &list).unwrap();
        assert!(!modes.write_protected() && modes.descriptor_sense());
        assert_eq!(sense(modes, CONTROL).unwrap()[4..], list[4..]);
    }

    #[test]
    fn nothing_is_taken_of_a_list_with_a_wrong_byte() {
        let mut modes = Modes::default();
        let mut list = sense(modes, CONTROL).unwrap();
        list[4 + 4] |= 0x08;
        list.extend_from_slice(&sense(modes, CACHING).unwrap()[4..]);
        list[4 + 12 + 2] = 0;
        assert_eq!(modes.select(Form::Short, &list), Err(Sense::in_parameters(18)));
        assert_eq!(modes, Modes::default());
    }

    #[test]
    fn a_page_that_is_not_there_is_refused_and_saving_too() {
        assert_eq!(sense(Modes::default(), 0x02), Err(Sense::in_command(2)));
        assert_eq!(sense(Modes::default(), 0xc0 | CONTROL), Err(Sense::NO_SAVING));
    }

    #[test]
    fn the_header_says_how_long_the_rest_is() {
        let all = sense(Modes::default(), ALL).unwrap();
        assert_eq!(usize::from(all[0]), all.len() - 1);
        let mut cdb = [0; 16];
        (cdb[0], cdb[2], cdb[8]) = (0x5a, ALL, 255);
        let all = Modes::default().sense(&cdb, 100, true).unwrap();
        assert_eq!((number(&all[..2]) as usize, all[3]), (all.len() - 2, 0x90));
        assert_eq!(all[8..16], [0, 0, 0, 100, 0, 0, 2, 0]);
    }

    proptest! {
        #[test]
        fn foreign_lists_never_panic(list: Vec<u8>, long: bool) {
            let form = if long { Form::Long } else { Form::Short };
            let _ = Modes::default().select(form, &list);
        }
    }
}
