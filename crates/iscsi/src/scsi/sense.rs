//! Statuses and sense data (SPC-4 §4.5): what was wrong, in SCSI's words.

use block::DiskError;

/// Status of a command (SAM-5 §5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Good = 0x00,
    /// Not done; the sense data says why.
    CheckCondition = 0x02,
    /// Another initiator has reserved the unit.
    ReservationConflict = 0x18,
    /// There is no room for the command now.
    TaskSetFull = 0x28,
}

/// A sense key with its additional sense code and qualifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sense {
    /// The sense key.
    pub key: u8,
    /// Additional sense code and, in the low byte, its qualifier.
    pub code: u16,
    /// The INFORMATION field: a logical block address, or an offset in bytes.
    pub information: Option<u64>,
    /// The first wrong byte, where a field is wrong.
    pub field: Option<Field>,
}

/// Where a wrong field lies (SPC-4 §4.5.2.4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Field {
    /// In the command, at this byte.
    Command(u16),
    /// In the parameter list, at this byte.
    Parameter(u16),
}

/// Why a command is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// CHECK CONDITION.
    Check(Sense),
    /// RESERVATION CONFLICT.
    Conflict,
}

impl From<Sense> for Fault {
    fn from(sense: Sense) -> Fault {
        Fault::Check(sense)
    }
}

const MEDIUM_ERROR: u8 = 3;
const ILLEGAL_REQUEST: u8 = 5;
const UNIT_ATTENTION: u8 = 6;
const DATA_PROTECT: u8 = 7;
const ABORTED_COMMAND: u8 = 0xb;
const MISCOMPARE: u8 = 0xe;

impl Sense {
    /// NO SENSE.
    pub const NONE: Sense = Sense::new(0, 0x0000);
    /// INVALID COMMAND OPERATION CODE.
    pub const OPERATION_CODE: Sense = Sense::new(ILLEGAL_REQUEST, 0x2000);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const OUT_OF_RANGE: Sense = Sense::new(ILLEGAL_REQUEST, 0x2100);
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const NO_UNIT: Sense = Sense::new(ILLEGAL_REQUEST, 0x2500);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LENGTH: Sense = Sense::new(ILLEGAL_REQUEST, 0x1a00);
    /// INVALID RELEASE OF PERSISTENT RESERVATION.
    pub const INVALID_RELEASE: Sense = Sense::new(ILLEGAL_REQUEST, 0x2604);
    /// INSUFFICIENT REGISTRATION RESOURCES.
    pub const REGISTRATIONS_FULL: Sense = Sense::new(ILLEGAL_REQUEST, 0x5504);
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const NO_SAVING: Sense = Sense::new(ILLEGAL_REQUEST, 0x3900);
    /// INVALID FIELD IN COMMAND INFORMATION UNIT.
    pub const INFORMATION_UNIT: Sense = Sense::new(ILLEGAL_REQUEST, 0x0e03);
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: Sense = Sense::new(DATA_PROTECT, 0x2700);
    /// SPACE ALLOCATION FAILED WRITE PROTECT.
    pub const NO_SPACE: Sense = Sense::new(DATA_PROTECT, 0x2707);
    /// UNEXPECTED UNSOLICITED DATA.
    pub const UNEXPECTED_DATA: Sense = Sense::new(ABORTED_COMMAND, 0x0c0c);
    /// INCORRECT AMOUNT OF DATA.
    pub const DATA_AMOUNT: Sense = Sense::new(ABORTED_COMMAND, 0x0c0d);
    /// DATA OFFSET ERROR: a piece of data came out of its order.
    pub const DATA_ORDER: Sense = Sense::new(ABORTED_COMMAND, 0x4b05);
    /// INTERNAL TARGET FAILURE.
    pub const INTERNAL: Sense = Sense::new(4, 0x4400);

    const fn new(key: u8, code: u16) -> Sense {
        Sense { key, code, information: None, field: None }
    }

    /// INVALID FIELD IN CDB, at this byte.
    pub fn in_command(byte: u16) -> Sense {
        Sense { field: Some(Field::Command(byte)), ..Sense::new(ILLEGAL_REQUEST, 0x2400) }
    }

    /// INVALID FIELD IN PARAMETER LIST, at this byte.
    pub fn in_parameters(byte: usize) -> Sense {
        let byte = u16::try_from(byte).unwrap_or(u16::MAX);
        Sense { field: Some(Field::Parameter(byte)), ..Sense::new(ILLEGAL_REQUEST, 0x2600) }
    }

    /// MISCOMPARE DURING VERIFY OPERATION, at this offset in bytes.
    pub fn miscompare(offset: u64) -> Sense {
        Sense { information: Some(offset), ..Sense::new(MISCOMPARE, 0x1d00) }
    }

    /// A unit attention of this code.
    pub(super) fn attention(code: u16) -> Sense {
        Sense::new(UNIT_ATTENTION, code)
    }

    /// Why reading at this block failed.
    pub(super) fn of_read(error: &DiskError, block: u64) -> Sense {
        Sense::of(error, Sense { information: Some(block), ..Sense::new(MEDIUM_ERROR, 0x1100) })
    }

    /// Why writing at this block failed.
    pub(super) fn of_write(error: &DiskError, block: u64) -> Sense {
        Sense::of(error, Sense { information: Some(block), ..Sense::new(MEDIUM_ERROR, 0x0c00) })
    }

    fn of(error: &DiskError, medium: Sense) -> Sense {
        match error {
            DiskError::OutOfRange { .. } => Sense::OUT_OF_RANGE,
            DiskError::ReadOnly => Sense::WRITE_PROTECTED,
            DiskError::NoSpace => Sense::NO_SPACE,
            DiskError::Io(_) => medium,
        }
    }

    /// The sense data in fixed format (SPC-4 §4.5.3).
    pub fn fixed(&self) -> Vec<u8> {
        let mut out = vec![0; 18];
        out[0] = 0x70;
        // Four bytes have no room for a larger value: then it is left out.
        if let Some(information) = self.information.and_then(|i| u32::try_from(i).ok()) {
            out[0] |= 0x80;
            out[3..7].copy_from_slice(&information.to_be_bytes());
        }
        out[2] = self.key;
        out[7] = 10;
        out[12..14].copy_from_slice(&self.code.to_be_bytes());
        if let Some(field) = self.field {
            out[15..18].copy_from_slice(&field.bytes());
        }
        out
    }

    /// The sense data in descriptor format (SPC-4 §4.5.2).
    pub fn descriptors(&self) -> Vec<u8> {
        let mut out = vec![0x72, self.key, 0, 0, 0, 0, 0, 0];
        out[2..4].copy_from_slice(&self.code.to_be_bytes());
        if let Some(information) = self.information {
            out.extend_from_slice(&[0x00, 0x0a, 0x80, 0]);
            out.extend_from_slice(&information.to_be_bytes());
        }
        if let Some(field) = self.field {
            out.extend_from_slice(&[0x02, 0x06, 0, 0]);
            out.extend_from_slice(&field.bytes());
            out.push(0);
        }
        out[7] = u8::try_from(out.len() - 8).expect("two descriptors are short");
        out
    }
}

impl Field {
    /// The three bytes of the sense key specific field.
    fn bytes(self) -> [u8; 3] {
        let (flags, at) = match self {
            Field::Command(at) => (0xc0, at),
            Field::Parameter(at) => (0x80, at),
        };
        let [high, low] = at.to_be_bytes();
        [flags, high, low]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_tell_the_same() {
        let sense = Sense::in_command(8);
        let fixed = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xc0, 0, 8];
        assert_eq!(sense.fixed(), fixed);
        let descriptors = [0x72, 5, 0x24, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0xc0, 0, 8, 0];
        assert_eq!(sense.descriptors(), descriptors);
        let miscompare = Sense::miscompare(513);
        assert_eq!(miscompare.fixed()[..7], [0xf0, 0, 0xe, 0, 0, 2, 1]);
        assert_eq!(miscompare.descriptors()[8..], [0, 0xa, 0x80, 0, 0, 0, 0, 0, 0, 0, 2, 1]);
    }

    #[test]
    fn errors_of_the_disk_keep_their_meaning() {
        let io = DiskError::Io("gone".to_owned());
        assert_eq!(Sense::of_read(&io, 9).code, 0x1100);
        assert_eq!(Sense::of_write(&io, 9), Sense { information: Some(9), ..Sense::new(3, 0x0c00) });
        assert_eq!(Sense::of_write(&DiskError::NoSpace, 9), Sense::NO_SPACE);
        assert_eq!(Sense::of_write(&DiskError::ReadOnly, 9), Sense::WRITE_PROTECTED);
    }

    #[test]
    fn a_block_that_fixed_format_cannot_hold_is_left_out() {
        let far = Sense::of_read(&DiskError::Io(String::new()), 1 << 32);
        assert_eq!(far.fixed()[0], 0x70);
        assert_eq!(far.descriptors()[12..20], (1u64 << 32).to_be_bytes());
    }
}
