//! Why a request is refused: a code for programs, whose class says what the caller can do next, and a sentence for people.
//!
//! Services refuse with these and know nothing of HTTP; which status a class has is said in [`http`](crate::http) alone.

use std::fmt;

use block::DiskError;

/// What the caller of something that was refused can do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The request makes no sense: change it.
    Invalid,
    /// The peer is known and may not do this: ask as somebody who may.
    Forbidden,
    /// What was named does not exist: name something else.
    NotFound,
    /// It contradicts what is there: change that first.
    Conflict,
    /// It would work at another time: try again.
    Unavailable,
    /// We failed: look into the log.
    Internal,
}

/// Declares the codes, each with the word by which programs know it: that never changes its meaning.
macro_rules! codes {
    ($($class:ident { $($code:ident $word:literal,)* })*) => {
        /// Why a request is refused, for programs.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Code {
            $($(
                #[doc = concat!("`", $word, "`")]
                $code,
            )*)*
            /// Something failed here.
            Internal,
            /// A word of another version.
            Other(Box<str>, Class),
        }

        impl Code {
            /// The word by which programs know it.
            pub fn word(&self) -> &str {
                match self {
                    $($(Code::$code => $word,)*)*
                    Code::Internal => INTERNAL,
                    Code::Other(word, _) => word,
                }
            }

            /// What the caller can do next.
            pub fn class(&self) -> Class {
                match self {
                    $($(Code::$code)|* => Class::$class,)*
                    Code::Internal => Class::Internal,
                    Code::Other(_, class) => *class,
                }
            }

            /// The code of a word that came with an answer of this class.
            pub(crate) fn of(word: &str, class: Class) -> Code {
                match word {
                    $($($word => Code::$code,)*)*
                    INTERNAL => Code::Internal,
                    other => Code::Other(other.into(), class),
                }
            }
        }
    };
}

const INTERNAL: &str = "internal";

codes! {
    Invalid {
        BadBacking "bad_backing",
        BadCertificateRequest "bad_certificate_request",
        BadFile "bad_file",
        BadFormat "bad_format",
        BadImage "bad_image",
        BadInitiator "bad_initiator",
        BadLifetime "bad_lifetime",
        BadMedium "bad_medium",
        BadName "bad_name",
        BadPath "bad_path",
        BadProfile "bad_profile",
        BadReady "bad_ready",
        BadRootPage "bad_root_page",
        BadSecret "bad_secret",
        BadSeed "bad_seed",
        BadVm "bad_vm",
        DiskTooSmall "disk_too_small",
        MutualChapAlone "mutual_chap_alone",
        NameTooLong "name_too_long",
        NoOverlay "no_overlay",
        NoSuchProtocol "no_such_protocol",
        NotAbsolute "not_absolute",
        OpenExport "open_export",
        OwnDirectory "own_directory",
        RelativePath "relative_path",
        SameNode "same_node",
        SameSecret "same_secret",
        Unwritable "unwritable",
    }
    Forbidden {
        NotAMember "not_a_member",
        NotANode "not_a_node",
        NotAnAdmin "not_an_admin",
        NotExpected "not_expected",
        NotItself "not_itself",
        TokenExpired "token_expired",
        UnknownToken "unknown_token",
        WrongName "wrong_name",
    }
    NotFound {
        NoSuchDisk "no_such_disk",
        NoSuchExport "no_such_export",
        NoSuchImage "no_such_image",
        NoSuchMedium "no_such_medium",
        NoSuchNode "no_such_node",
        NoSuchPath "no_such_path",
        NoSuchSnapshot "no_such_snapshot",
        NoSuchVm "no_such_vm",
        NotAttached "not_attached",
        NotComing "not_coming",
    }
    Conflict {
        CacheTooSmall "cache_too_small",
        ClusterFull "cluster_full",
        DiskFull "disk_full",
        Exported "exported",
        FileExists "file_exists",
        ForeignMedium "foreign_medium",
        ImageInUse "image_in_use",
        InUse "in_use",
        IsOrigin "is_origin",
        LastMedium "last_medium",
        MediumExists "medium_exists",
        MediumInUse "medium_in_use",
        Moving "moving",
        NameTaken "name_taken",
        NeverStarted "never_started",
        NoPortal "no_portal",
        NoSpace "no_space",
        NotItsOrigin "not_its_origin",
        NotMoved "not_moved",
        NotQuiesced "not_quiesced",
        NotReady "not_ready",
        NotRunning "not_running",
        NotStartable "not_startable",
        NothingChanged "nothing_changed",
        OtherImage "other_image",
        RegisterAgain "register_again",
        Running "running",
        Settling "settling",
        SeveralDisks "several_disks",
        SnapshotExists "snapshot_exists",
        TargetExists "target_exists",
        TooManyLayers "too_many_layers",
        TooManyTokens "too_many_tokens",
        UnknownMachine "unknown_machine",
        WrongKind "wrong_kind",
        VmExists "vm_exists",
    }
    Unavailable {
        NoManifest "no_manifest",
        NoTarget "no_target",
        NoVolt "no_volt",
        NotTaken "not_taken",
        TokensUnavailable "tokens_unavailable",
    }
}

/// A request was refused or failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Why, for programs.
    pub code: Code,
    /// What was wrong, with which value.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Refusal {
    /// A refusal with its code and its sentence for people.
    pub fn new(code: Code, message: impl Into<String>) -> Refusal {
        Refusal { code, message: message.into(), hint: None }
    }

    /// We failed. The message reaches the peer, so it says nothing secret.
    pub fn internal(message: impl Into<String>) -> Refusal {
        Refusal::new(Code::Internal, message)
    }

    /// Adds what to do.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Refusal {
        Refusal { hint: Some(hint.into()), ..self }
    }
}

impl From<DiskError> for Refusal {
    fn from(error: DiskError) -> Refusal {
        match error {
            DiskError::NoSpace => Refusal::new(Code::DiskFull, error.to_string())
                .with_hint("make room on the file system of the node's directory, then try again"),
            other => Refusal::internal(other.to_string()),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, ": {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_gives_its_code_back_and_unknown_words_are_kept() {
        for code in [Code::NoSuchImage, Code::ImageInUse, Code::NotItsOrigin, Code::Internal] {
            assert_eq!(Code::of(code.word(), code.class()), code);
        }
        // Another version may answer with another status.
        assert_eq!(Code::of("not_its_origin", Class::Forbidden), Code::NotItsOrigin);
        let later = Code::of("of_a_later_version", Class::Conflict);
        assert_eq!((later.word(), later.class()), ("of_a_later_version", Class::Conflict));
    }
}
