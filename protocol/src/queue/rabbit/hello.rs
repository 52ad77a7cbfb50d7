//! The broker's first words: its version, which the library does not hand on.

use std::time::Duration;

use lapin::uri::{AMQPScheme, AMQPUri};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Code, Error, Result};

const TIMEOUT: Duration = Duration::from_secs(5);
/// A Start frame is below one kilobyte.
const WORDS_MAX: usize = 4096;
/// Opens AMQP 0-9-1.
const HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";

/// The version of the broker at `url`. `None`: it speaks TLS, or does not say.
pub async fn version(url: &str) -> Result<Option<String>> {
    let uri: AMQPUri = url
        .parse()
        .map_err(|e: String| Error::new(Code::ConfigInvalid, format!("not an AMQP URL: {e}")))?;
    if uri.scheme == AMQPScheme::AMQPS {
        return Ok(None);
    }
    let place = format!("{}:{}", uri.authority.host, uri.authority.port);
    let asked = async {
        let mut stream =
            TcpStream::connect((uri.authority.host.as_str(), uri.authority.port)).await?;
        stream.write_all(HEADER).await?;
        let mut words = vec![0; WORDS_MAX];
        let mut length = 0;
        while length < words.len() {
            let read = stream.read(&mut words[length..]).await?;
            length += read;
            if read == 0 || version_in(&words[..length]).is_some() {
                break;
            }
        }
        Ok::<_, std::io::Error>(version_in(&words[..length]))
    };
    let failed =
        |why: String| Error::new(Code::QueueFailed, format!("reach RabbitMQ at {place}: {why}"));
    match tokio::time::timeout(TIMEOUT, asked).await {
        Ok(version) => version.map_err(|e| failed(e.to_string())),
        Err(_) => Err(failed("no answer".to_owned())),
    }
}

/// The field `version` of the server's properties: a name, `S`, a length of four bytes, a text.
fn version_in(words: &[u8]) -> Option<String> {
    const FIELD: &[u8] = b"\x07versionS";
    let start = words.windows(FIELD.len()).position(|window| window == FIELD)? + FIELD.len();
    let length: [u8; 4] = words.get(start..start + 4)?.try_into().ok()?;
    let end = start + 4 + usize::try_from(u32::from_be_bytes(length)).ok()?;
    String::from_utf8(words.get(start + 4..end)?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_found_among_the_properties() {
        let words =
            b"\x01\0\0\x07productS\0\0\0\x08RabbitMQ\x07versionS\0\0\0\x063.10.8\x08platform";
        assert_eq!(version_in(words).as_deref(), Some("3.10.8"));
        assert_eq!(version_in(&words[..40]), None);
        assert_eq!(version_in(b"nothing"), None);
    }
}
