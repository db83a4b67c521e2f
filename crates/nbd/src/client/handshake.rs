//! The client's side of the negotiation: a state machine without a socket.
//!
//! Asks for TLS if it is wanted, then extended headers, else structured replies, then `base:allocation`,
//! then `GO`; a server that lacks one of these is taken as it is, except for TLS.

use crate::limits::{OPTION_BYTES_MAX, OPTION_REPLIES_MAX, REQUEST_BYTES_MAX};
use crate::proto::{
    BASE_ALLOCATION, EXPORT_NAME_PADDING, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, Framing, INIT_MAGIC,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, info, option, rep, transmission,
};
use crate::reply::BadReply;

/// Whether TLS is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantTls {
    /// Plain text.
    No,
    /// TLS or nothing.
    Yes,
}

/// What was agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// Transmission flags, see [`transmission`].
    pub flags: u16,
    /// How requests and replies are framed.
    pub framing: Framing,
    /// The id of `base:allocation`, if the server has it.
    pub context: Option<u32>,
    /// Requests must be aligned to this many bytes.
    pub align_bytes: u32,
    /// Longest payload in bytes.
    pub payload_bytes_max: u32,
}

/// What a call of [`Handshake::feed`] led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The message is not complete: come back with more bytes.
    Incomplete,
    /// A message was dealt with; send what was answered.
    Continue,
    /// Begin the TLS handshake.
    StartTls,
    /// Requests may follow.
    Done(Agreed),
}

/// The server cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The server broke the protocol.
    #[error(transparent)]
    Protocol(#[from] BadReply),
    /// The server has no such export, or not for us.
    #[error("the server refused the export '{export}': {why}")]
    Refused {
        /// The export that was asked for.
        export: String,
        /// What the server said.
        why: String,
    },
    /// TLS is wanted and the server has none.
    #[error("the server has no TLS: {0}")]
    NoTls(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Greeting,
    Tls,
    Extended,
    Structured,
    Contexts,
    Go,
    ExportName,
}

/// One negotiation.
pub struct Handshake {
    stage: Stage,
    export: String,
    want_tls: WantTls,
    no_zeroes: bool,
    replies: u32,
    size_and_flags: Option<(u64, u16)>,
    agreed: Agreed,
}

struct OptionReply<'a> {
    kind: u32,
    data: &'a [u8],
}

impl OptionReply<'_> {
    fn is_error(&self) -> bool {
        self.kind & rep::ERR_BIT != 0
    }

    fn message(&self) -> String {
        let text = match self.kind {
            rep::ERR_UNKNOWN => "unknown export",
            rep::ERR_POLICY => "forbidden",
            rep::ERR_TLS_REQD => "TLS is required",
            rep::ERR_UNSUP => "not supported",
            _ => "refused",
        };
        let said: String = String::from_utf8_lossy(self.data).chars().flat_map(char::escape_debug).collect();
        if said.is_empty() { text.to_owned() } else { format!("{text} ({said})") }
    }
}

impl Handshake {
    /// A negotiation for an export, before the first byte.
    pub fn new(export: &str, want_tls: WantTls) -> Handshake {
        let agreed = Agreed {
            size_bytes: 0,
            flags: 0,
            framing: Framing::Simple,
            context: None,
            align_bytes: 1,
            payload_bytes_max: REQUEST_BYTES_MAX as u32,
        };
        let export = export.to_owned();
        let stage = Stage::Greeting;
        Handshake { stage, export, want_tls, no_zeroes: false, replies: 0, size_and_flags: None, agreed }
    }

    /// Deals with the message at the front of `input`, appends what to send to `out`, and says how many
    /// bytes the message had (0 with [`Progress::Incomplete`]).
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, Progress), HandshakeError> {
        match self.stage {
            Stage::Greeting => self.greeting(input, out),
            Stage::ExportName => self.export_name(input),
            _ => self.option_reply(input, out),
        }
    }

    /// TLS is up; the negotiation goes on in it.
    pub fn tls_is_up(&mut self, out: &mut Vec<u8>) {
        self.ask(Stage::Extended, out);
    }

    fn greeting(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, Progress), HandshakeError> {
        let mut fields = Fields(input);
        let (Some(init), Some(option)) = (fields.u64(), fields.u64()) else {
            return Ok((0, Progress::Incomplete));
        };
        if init != INIT_MAGIC || option != OPTION_MAGIC {
            return Err(BadReply("it is not an NBD server of the newstyle kind").into());
        }
        let Some(flags) = fields.u16() else { return Ok((0, Progress::Incomplete)) };
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(BadReply("it does not speak fixed newstyle").into());
        }
        self.no_zeroes = flags & FLAG_NO_ZEROES != 0;
        let mine = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
        out.extend_from_slice(&mine.to_be_bytes());
        let first = if self.want_tls == WantTls::Yes { Stage::Tls } else { Stage::Extended };
        self.ask(first, out);
        Ok((18, Progress::Continue))
    }

    fn ask(&mut self, stage: Stage, out: &mut Vec<u8>) {
        self.stage = stage;
        let name = self.export.as_bytes();
        let name_bytes = (name.len() as u32).to_be_bytes();
        let (option, data) = match stage {
            Stage::Greeting | Stage::Tls => (option::STARTTLS, Vec::new()),
            Stage::Extended => (option::EXTENDED_HEADERS, Vec::new()),
            Stage::Structured => (option::STRUCTURED_REPLY, Vec::new()),
            Stage::Contexts => {
                let query_bytes = (BASE_ALLOCATION.len() as u32).to_be_bytes();
                let one = 1u32.to_be_bytes();
                let data = [&name_bytes, name, &one, &query_bytes, BASE_ALLOCATION.as_bytes()].concat();
                (option::SET_META_CONTEXT, data)
            }
            Stage::Go => {
                let wants = [1u16.to_be_bytes(), info::BLOCK_SIZE.to_be_bytes()].concat();
                (option::GO, [&name_bytes, name, &wants].concat())
            }
            Stage::ExportName => (option::EXPORT_NAME, name.to_vec()),
        };
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(&data);
    }

    fn option_reply(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, Progress), HandshakeError> {
        let mut fields = Fields(input);
        let mut head = || Some((fields.u64()?, fields.u32()?, fields.u32()?, fields.u32()?));
        let Some((magic, option, kind, len)) = head() else { return Ok((0, Progress::Incomplete)) };
        if magic != OPTION_REPLY_MAGIC || option != self.option() {
            return Err(BadReply("the reply to an option is none").into());
        }
        if len as usize > OPTION_BYTES_MAX {
            return Err(BadReply("the reply to an option is too long").into());
        }
        let Some(data) = fields.bytes(len as usize) else { return Ok((0, Progress::Incomplete)) };
        self.replies += 1;
        if self.replies > OPTION_REPLIES_MAX {
            return Err(BadReply("it sends replies to an option without end").into());
        }
        let progress = self.answer(&OptionReply { kind, data }, out)?;
        Ok((input.len() - fields.0.len(), progress))
    }

    /// The option whose reply is awaited.
    fn option(&self) -> u32 {
        match self.stage {
            Stage::Greeting | Stage::Tls => option::STARTTLS,
            Stage::Extended => option::EXTENDED_HEADERS,
            Stage::Structured => option::STRUCTURED_REPLY,
            Stage::Contexts => option::SET_META_CONTEXT,
            Stage::Go => option::GO,
            Stage::ExportName => option::EXPORT_NAME,
        }
    }

    fn answer(&mut self, reply: &OptionReply<'_>, out: &mut Vec<u8>) -> Result<Progress, HandshakeError> {
        if reply.kind == rep::ERR_TLS_REQD && self.stage != Stage::Tls {
            return Err(self.refused(reply));
        }
        match (self.stage, reply.kind) {
            (Stage::Tls, rep::ACK) => return Ok(Progress::StartTls),
            (Stage::Tls, _) if reply.is_error() => return Err(HandshakeError::NoTls(reply.message())),
            (Stage::Extended, rep::ACK) => {
                self.agreed.framing = Framing::Extended;
                self.ask(Stage::Contexts, out);
            }
            (Stage::Extended, _) if reply.is_error() => self.ask(Stage::Structured, out),
            (Stage::Structured, rep::ACK) => {
                self.agreed.framing = Framing::Structured;
                self.ask(Stage::Contexts, out);
            }
            (Stage::Structured, _) if reply.is_error() => self.ask(Stage::Go, out),
            (Stage::Contexts, rep::META_CONTEXT) => {
                let mut fields = Fields(reply.data);
                let id = fields.u32().ok_or(BadReply("a metadata context has no id"))?;
                if fields.0 == BASE_ALLOCATION.as_bytes() {
                    self.agreed.context = Some(id);
                }
            }
            (Stage::Contexts, rep::ACK) => self.ask(Stage::Go, out),
            (Stage::Contexts, _) if reply.is_error() => {
                self.agreed.context = None;
                self.ask(Stage::Go, out);
            }
            (Stage::Go, rep::INFO) => self.info(reply.data)?,
            (Stage::Go, rep::ACK) => {
                let (size, flags) = self.size_and_flags.ok_or(BadReply("it did not tell the size"))?;
                return self.done(size, flags);
            }
            (Stage::Go, rep::ERR_UNSUP) => {
                // Contexts were selected for an export that this old option may not honour.
                self.agreed.context = None;
                self.ask(Stage::ExportName, out);
            }
            (Stage::Go, _) if reply.is_error() => return Err(self.refused(reply)),
            _ => return Err(BadReply("the reply does not fit its option").into()),
        }
        Ok(Progress::Continue)
    }

    fn info(&mut self, data: &[u8]) -> Result<(), BadReply> {
        let mut fields = Fields(data);
        let cut = BadReply("an item of information is cut off");
        match fields.u16().ok_or(cut.clone())? {
            info::EXPORT => {
                let size_and_flags = fields.u64().zip(fields.u16());
                self.size_and_flags = Some(size_and_flags.ok_or(cut)?);
            }
            info::BLOCK_SIZE => {
                let mut sizes = || Some((fields.u32()?, fields.u32()?, fields.u32()?));
                let (align, _, longest) = sizes().ok_or(cut)?;
                if !align.is_power_of_two() || align > 64 << 10 || longest < align {
                    return Err(BadReply("its block sizes are impossible"));
                }
                self.agreed.align_bytes = align;
                self.agreed.payload_bytes_max = longest.min(REQUEST_BYTES_MAX as u32) / align * align;
            }
            _ => {}
        }
        Ok(())
    }

    fn export_name(&self, input: &[u8]) -> Result<(usize, Progress), HandshakeError> {
        let mut fields = Fields(input);
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        let mut take = || {
            let size_and_flags = (fields.u64()?, fields.u16()?);
            fields.bytes(padding)?;
            Some(size_and_flags)
        };
        let Some((size, flags)) = take() else { return Ok((0, Progress::Incomplete)) };
        Ok((8 + 2 + padding, self.done(size, flags)?))
    }

    fn done(&self, size_bytes: u64, flags: u16) -> Result<Progress, HandshakeError> {
        if flags & transmission::HAS_FLAGS == 0 || size_bytes > i64::MAX as u64 {
            return Err(BadReply("the size or the flags of the export are impossible").into());
        }
        Ok(Progress::Done(Agreed { size_bytes, flags, ..self.agreed }))
    }

    fn refused(&self, reply: &OptionReply<'_>) -> HandshakeError {
        let export = self.export.chars().flat_map(char::escape_debug).collect();
        HandshakeError::Refused { export, why: reply.message() }
    }
}
