//! The PDUs of RFC 7143 §11.3 to §11.19, one type each: the fields and where they lie in the header.
//!
//! Fields that no side of ours uses are left out and sent as zeroes.

use super::header::{Cdb, Field, HEADER_BYTES, Header, Isid};

/// The tag that means none.
pub const NO_TAG: u32 = 0xffff_ffff;

macro_rules! pdus {
    ($( $(#[$doc:meta])* $name:ident = $opcode:literal {
        $( $(#[$field_doc:meta])* $field:ident: $type:ty = $at:literal, )*
    } )*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $type, )*
        }

        impl $name {
            /// Its operation code.
            pub const OPCODE: u8 = $opcode;

            /// The fields of a header that has this operation code.
            pub fn parse(header: &Header) -> $name {
                debug_assert_eq!(header.opcode(), $opcode);
                $name { $( $field: Field::get(&header.0, $at), )* }
            }

            /// The header, for a PDU without data.
            pub fn header(&self) -> Header {
                let mut bytes = [0; HEADER_BYTES];
                bytes[0] = $opcode;
                $( self.$field.put(&mut bytes, $at); )*
                Header(bytes)
            }
        }
    )*};
}

pdus! {
    /// NOP-Out (§11.18).
    NopOut = 0x00 {
        /// `0x80`.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag; [`NO_TAG`] wants no answer.
        task_tag: u32 = 16,
        /// Target Transfer Tag: that of the NOP-In that this answers.
        transfer_tag: u32 = 20,
        /// Command number.
        cmd_sn: u32 = 24,
        /// Next status number that is expected.
        exp_stat_sn: u32 = 28,
    }
    /// SCSI Command (§11.3).
    ScsiCommand = 0x01 {
        /// [`command`] bits and the task attribute.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// Expected data transfer length in bytes.
        expected_bytes: u32 = 20,
        /// Command number.
        cmd_sn: u32 = 24,
        /// Next status number that is expected.
        exp_stat_sn: u32 = 28,
        /// The SCSI command.
        cdb: Cdb = 32,
    }
    /// Task Management Function Request (§11.5).
    TaskRequest = 0x02 {
        /// `0x80` and a [`function`].
        function: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag of this request.
        task_tag: u32 = 16,
        /// Initiator Task Tag of the task that is meant.
        referenced_task_tag: u32 = 20,
        /// Command number.
        cmd_sn: u32 = 24,
        /// Next status number that is expected.
        exp_stat_sn: u32 = 28,
        /// Command number of the task that is meant.
        ref_cmd_sn: u32 = 32,
    }
    /// Login Request (§11.12).
    LoginRequest = 0x03 {
        /// [`stage`] bits.
        flags: u8 = 1,
        /// Highest version that is known.
        version_max: u8 = 2,
        /// Lowest version that is known.
        version_min: u8 = 3,
        /// Initiator's part of the session's name.
        isid: Isid = 8,
        /// Target's part of it; 0 asks for a new session.
        tsih: u16 = 14,
        /// Initiator Task Tag, the same throughout the login.
        task_tag: u32 = 16,
        /// Connection.
        cid: u16 = 20,
        /// First command number of the session.
        cmd_sn: u32 = 24,
        /// Next status number that is expected.
        exp_stat_sn: u32 = 28,
    }
    /// Text Request (§11.10).
    TextRequest = 0x04 {
        /// [`text`] bits.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// Target Transfer Tag of the response that this continues, else [`NO_TAG`].
        transfer_tag: u32 = 20,
        /// Command number.
        cmd_sn: u32 = 24,
        /// Next status number that is expected.
        exp_stat_sn: u32 = 28,
    }
    /// SCSI Data-Out (§11.7).
    DataOut = 0x05 {
        /// `0x80` in the last of a sequence.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag of the command.
        task_tag: u32 = 16,
        /// Target Transfer Tag of the R2T, [`NO_TAG`] if unsolicited.
        transfer_tag: u32 = 20,
        /// Next status number that is expected.
        exp_stat_sn: u32 = 28,
        /// Number within the sequence.
        data_sn: u32 = 36,
        /// Offset within the command's data.
        offset: u32 = 40,
    }
    /// Logout Request (§11.14).
    LogoutRequest = 0x06 {
        /// `0x80` and the reason: 0 session, 1 connection, 2 recovery.
        reason: u8 = 1,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// Connection that is meant.
        cid: u16 = 20,
        /// Command number.
        cmd_sn: u32 = 24,
        /// Next status number that is expected.
        exp_stat_sn: u32 = 28,
    }
    /// SNACK Request (§11.16); of no use at error recovery level 0.
    Snack = 0x10 {
        /// `0x80` and the type.
        flags: u8 = 1,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
    }
    /// NOP-In (§11.19).
    NopIn = 0x20 {
        /// `0x80`.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag of the NOP-Out that this answers, else [`NO_TAG`].
        task_tag: u32 = 16,
        /// Target Transfer Tag; [`NO_TAG`] wants no answer.
        transfer_tag: u32 = 20,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
    }
    /// SCSI Response (§11.4).
    ScsiResponse = 0x21 {
        /// `0x80` and [`residual`] bits.
        flags: u8 = 1,
        /// 0: completed at the target.
        response: u8 = 2,
        /// SCSI status.
        status: u8 = 3,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
        /// Data-In or R2T PDUs that the command had.
        exp_data_sn: u32 = 36,
        /// Residual count in bytes.
        residual_bytes: u32 = 44,
    }
    /// Task Management Function Response (§11.6).
    TaskResponse = 0x22 {
        /// `0x80`.
        flags: u8 = 1,
        /// A [`task_response`].
        response: u8 = 2,
        /// Initiator Task Tag of the request.
        task_tag: u32 = 16,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
    }
    /// Login Response (§11.13).
    LoginResponse = 0x23 {
        /// [`stage`] bits.
        flags: u8 = 1,
        /// Highest version that is known.
        version_max: u8 = 2,
        /// Version in use.
        version_active: u8 = 3,
        /// Initiator's part of the session's name.
        isid: Isid = 8,
        /// Target's part of it, set in the last response.
        tsih: u16 = 14,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
        /// Status class and detail: a [`login_status`].
        status: u16 = 36,
    }
    /// Text Response (§11.11).
    TextResponse = 0x24 {
        /// [`text`] bits.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// Target Transfer Tag by which it is continued, else [`NO_TAG`].
        transfer_tag: u32 = 20,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
    }
    /// SCSI Data-In (§11.7).
    DataIn = 0x25 {
        /// [`data_in`] and [`residual`] bits.
        flags: u8 = 1,
        /// SCSI status, if the status bit is set.
        status: u8 = 3,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// [`NO_TAG`].
        transfer_tag: u32 = 20,
        /// Status number, if the status bit is set.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
        /// Number within the command.
        data_sn: u32 = 36,
        /// Offset within the command's data.
        offset: u32 = 40,
        /// Residual count in bytes, if the status bit is set.
        residual_bytes: u32 = 44,
    }
    /// Logout Response (§11.15).
    LogoutResponse = 0x26 {
        /// `0x80`.
        flags: u8 = 1,
        /// 0: closed; 1: no such connection; 2: no recovery.
        response: u8 = 2,
        /// Initiator Task Tag.
        task_tag: u32 = 16,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
    }
    /// Ready To Transfer (§11.8).
    R2t = 0x31 {
        /// `0x80`.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// Initiator Task Tag of the command.
        task_tag: u32 = 16,
        /// Target Transfer Tag that the data carries.
        transfer_tag: u32 = 20,
        /// Next status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
        /// Number within the command.
        r2t_sn: u32 = 36,
        /// Offset within the command's data.
        offset: u32 = 40,
        /// Bytes that are wanted.
        wanted_bytes: u32 = 44,
    }
    /// Asynchronous Message (§11.9).
    Async = 0x32 {
        /// `0x80`.
        flags: u8 = 1,
        /// Logical unit.
        lun: u64 = 8,
        /// [`NO_TAG`].
        task_tag: u32 = 16,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
        /// An [`event`].
        event: u8 = 36,
        /// Seconds until logout is expected, or the connection.
        parameter1: u16 = 38,
        /// Seconds to wait before a new login.
        parameter2: u16 = 40,
        /// Seconds after which there is nothing left to log in to.
        parameter3: u16 = 42,
    }
    /// Reject (§11.17); its data is the header that was refused.
    Reject = 0x3f {
        /// `0x80`.
        flags: u8 = 1,
        /// A [`reject_reason`].
        reason: u8 = 2,
        /// [`NO_TAG`].
        task_tag: u32 = 16,
        /// Status number.
        stat_sn: u32 = 24,
        /// Next command number that is expected.
        exp_cmd_sn: u32 = 28,
        /// Last command number that is welcome.
        max_cmd_sn: u32 = 32,
    }
}

/// The last, or only, PDU of its kind.
pub const FINAL: u8 = 0x80;

/// Flags of a [`ScsiCommand`].
pub mod command {
    /// Data comes in.
    pub const READ: u8 = 0x40;
    /// Data goes out.
    pub const WRITE: u8 = 0x20;
    /// Mask of the task attribute.
    pub const ATTRIBUTE: u8 = 0x07;
    /// The attribute ORDERED.
    pub const ORDERED: u8 = 2;
}

/// Flags of a [`DataIn`].
pub mod data_in {
    /// The status comes with it.
    pub const STATUS: u8 = 0x01;
}

/// How the transfer differed from what was expected, in a [`ScsiResponse`] or a [`DataIn`] with status.
pub mod residual {
    /// More was there than was expected.
    pub const OVERFLOW: u8 = 0x04;
    /// Less was there.
    pub const UNDERFLOW: u8 = 0x02;
}

/// Flags and stages of a login.
pub mod stage {
    /// On to the next stage.
    pub const TRANSIT: u8 = 0x80;
    /// The text goes on in the next PDU.
    pub const CONTINUE: u8 = 0x40;
    /// Security negotiation.
    pub const SECURITY: u8 = 0;
    /// Operational negotiation.
    pub const OPERATIONAL: u8 = 1;
    /// Full feature phase.
    pub const FULL_FEATURE: u8 = 3;
}

/// Flags of text requests and responses.
pub mod text {
    /// The text goes on in the next PDU.
    pub const CONTINUE: u8 = 0x40;
}

/// Task management functions (§11.5.1).
pub mod function {
    /// Abort one task.
    pub const ABORT_TASK: u8 = 1;
    /// Abort all tasks of this session at a logical unit.
    pub const ABORT_TASK_SET: u8 = 2;
    /// End an auto contingent allegiance.
    pub const CLEAR_ACA: u8 = 3;
    /// Abort the whole task set.
    pub const CLEAR_TASK_SET: u8 = 4;
    /// Reset a logical unit.
    pub const LOGICAL_UNIT_RESET: u8 = 5;
    /// Reset all logical units.
    pub const TARGET_WARM_RESET: u8 = 6;
    /// The same, and close all connections.
    pub const TARGET_COLD_RESET: u8 = 7;
    /// Move a task to another connection.
    pub const TASK_REASSIGN: u8 = 8;
}

/// Answers to task management functions (§11.6.1).
pub mod task_response {
    /// Done.
    pub const COMPLETE: u8 = 0;
    /// There is no such task.
    pub const NO_TASK: u8 = 1;
    /// There is no such logical unit.
    pub const NO_UNIT: u8 = 2;
    /// Tasks cannot be moved here.
    pub const NO_REASSIGNMENT: u8 = 4;
    /// Not supported.
    pub const UNSUPPORTED: u8 = 5;
    /// Refused.
    pub const REJECTED: u8 = 255;
}

/// Status class and detail of a login (§11.13.5).
pub mod login_status {
    /// Good.
    pub const SUCCESS: u16 = 0x0000;
    /// The initiator erred.
    pub const INITIATOR_ERROR: u16 = 0x0200;
    /// Authentication failed.
    pub const AUTHENTICATION: u16 = 0x0201;
    /// This initiator may not.
    pub const FORBIDDEN: u16 = 0x0202;
    /// There is no such target.
    pub const NOT_FOUND: u16 = 0x0203;
    /// The target was removed.
    pub const REMOVED: u16 = 0x0204;
    /// No version in common.
    pub const VERSION: u16 = 0x0205;
    /// No further connection fits this session.
    pub const TOO_MANY_CONNECTIONS: u16 = 0x0206;
    /// A needed key is missing.
    pub const MISSING_PARAMETER: u16 = 0x0207;
    /// This type of session is not supported.
    pub const SESSION_TYPE: u16 = 0x0209;
    /// There is no such session.
    pub const NO_SESSION: u16 = 0x020a;
    /// The request does not fit the stage.
    pub const INVALID_REQUEST: u16 = 0x020b;
    /// The target cannot serve now.
    pub const OUT_OF_RESOURCES: u16 = 0x0302;
}

/// Events of an [`Async`].
pub mod event {
    /// The target asks for a logout.
    pub const LOGOUT_REQUESTED: u8 = 1;
    /// The target is about to close all connections of the session.
    pub const SESSION_DROPPED: u8 = 3;
}

/// Reasons of a [`Reject`] (§11.17.1).
pub mod reject_reason {
    /// SNACK where there is no recovery.
    pub const SNACK: u8 = 0x03;
    /// Not allowed here and now.
    pub const PROTOCOL: u8 = 0x04;
    /// Not supported.
    pub const UNSUPPORTED: u8 = 0x05;
    /// Too many immediate commands.
    pub const IMMEDIATE: u8 = 0x06;
    /// A field is wrong.
    pub const INVALID_FIELD: u8 = 0x09;
}
