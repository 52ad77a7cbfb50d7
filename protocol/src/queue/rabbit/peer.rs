//! A scripted AMQP peer: what Debian's RabbitMQ 3.10 cannot be made to do, or not on demand.
//!
//! It answers the handshake and every declaration, and does what its script says with publishes and
//! consumers. Frames are written by hand from the AMQP 0-9-1 specification (type, channel, length,
//! payload, 0xCE): the library under test encodes nothing here.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What the peer does; each number counts from 0 over all connections.
#[derive(Clone)]
pub(super) struct Script {
    /// For the n-th message published.
    pub(super) publish: fn(usize) -> OnPublish,
    /// For the n-th consumer.
    pub(super) consume: fn(usize) -> OnConsume,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum OnPublish {
    Ack,
    Nack,
    /// The message found no queue: it is returned, then acknowledged.
    Return,
    /// An alarm: the connection is blocked, the message is acknowledged.
    Block,
    /// Not a word from now on, heartbeats included.
    FallSilent,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum OnConsume {
    Nothing,
    /// Delivers one message.
    Deliver,
    /// Ends the consumer, as RabbitMQ 4.3 does after a timeout.
    Cancel,
    /// Closes the channel, as RabbitMQ before 4.3 does after a timeout.
    CloseChannel,
}

/// What the peer saw.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) connections: usize,
    pub(super) published: usize,
    pub(super) consumed: usize,
    pub(super) acknowledged: usize,
    /// Payloads of queue.declare: name and arguments are looked for as bytes.
    pub(super) declared: Vec<Vec<u8>>,
}

/// A listening peer.
pub(super) struct Peer {
    pub(super) url: String,
    pub(super) seen: Arc<Mutex<Seen>>,
}

impl Script {
    pub(super) fn quiet() -> Self {
        Self { publish: |_| OnPublish::Ack, consume: |_| OnConsume::Nothing }
    }
}

pub(super) async fn start(script: Script, heartbeat_seconds: u16) -> Peer {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let all = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            all.lock().unwrap().connections += 1;
            let talk = Talk { stream, script: script.clone(), seen: Arc::clone(&all) };
            tokio::spawn(talk.run());
        }
    });
    let url = format!("amqp://guest:guest@127.0.0.1:{port}/%2f?heartbeat={heartbeat_seconds}");
    Peer { url, seen }
}

struct Talk {
    stream: TcpStream,
    script: Script,
    seen: Arc<Mutex<Seen>>,
}

fn short_text(text: &str) -> Vec<u8> {
    let mut bytes = vec![u8::try_from(text.len()).unwrap()];
    bytes.extend(text.as_bytes());
    bytes
}

fn long_text(text: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text);
    bytes
}

impl Talk {
    async fn run(mut self) {
        let mut header = [0; 8];
        if self.stream.read_exact(&mut header).await.is_err() {
            return;
        }
        let mut start = vec![0, 9];
        // The properties: version 4.3.0, and the capability to tell of blocked connections.
        let mut properties = short_text("version");
        properties.push(b'S');
        properties.extend(long_text(b"4.3.0"));
        start.extend(long_text(&properties));
        start.extend(long_text(b"PLAIN AMQPLAIN"));
        start.extend(long_text(b"en_US"));
        self.method(0, 10, 10, &start).await;
        // Publish counts per channel are what confirmations name.
        let mut tags = std::collections::HashMap::<u16, u64>::new();
        while let Some((kind, channel, payload)) = self.frame().await {
            if kind != 1 {
                // Headers and bodies of messages; a body ends one. Bodies here fit one frame.
                if kind == 3 {
                    let tag = tags.entry(channel).or_default();
                    *tag += 1;
                    let tag = *tag;
                    if !self.published(channel, tag).await {
                        std::future::pending::<()>().await;
                    }
                }
                continue;
            }
            let class = u16::from_be_bytes([payload[0], payload[1]]);
            let method = u16::from_be_bytes([payload[2], payload[3]]);
            self.answer(channel, class, method, &payload[4..]).await;
        }
    }

    async fn answer(&mut self, channel: u16, class: u16, method: u16, rest: &[u8]) {
        match (class, method) {
            // start-ok: tune with 100 channels, frames of 128 KiB, our heartbeat.
            (10, 11) => self.method(0, 10, 30, &[0, 100, 0, 2, 0, 0, 0, 60]).await,
            (10, 40) => {
                self.method(0, 10, 41, &short_text("")).await;
            }
            (10, 50) => self.method(0, 10, 51, &[]).await,
            (20, 10) => self.method(channel, 20, 11, &long_text(b"")).await,
            (20, 40) => self.method(channel, 20, 41, &[]).await,
            (40, 10) => self.method(channel, 40, 11, &[]).await,
            (50, 10) => {
                let name_length = usize::from(rest[2]);
                let name = &rest[3..3 + name_length];
                self.seen.lock().unwrap().declared.push(rest.to_vec());
                let mut ok = short_text(std::str::from_utf8(name).unwrap());
                ok.extend([0; 8]);
                self.method(channel, 50, 11, &ok).await;
            }
            (50, 20) => self.method(channel, 50, 21, &[]).await,
            (60, 10) => self.method(channel, 60, 11, &[]).await,
            (60, 20) => self.consumed(channel).await,
            (60, 30) => self.method(channel, 60, 31, &short_text("c")).await,
            (60, 80) => self.seen.lock().unwrap().acknowledged += 1,
            (85, 10) => self.method(channel, 85, 11, &[]).await,
            _ => {}
        }
    }

    /// False: says nothing from now on.
    async fn published(&mut self, channel: u16, tag: u64) -> bool {
        let count = {
            let mut seen = self.seen.lock().unwrap();
            seen.published += 1;
            seen.published - 1
        };
        let tag = tag.to_be_bytes();
        match (self.script.publish)(count) {
            OnPublish::Ack => self.method(channel, 60, 80, &[&tag[..], &[0]].concat()).await,
            OnPublish::Nack => self.method(channel, 60, 120, &[&tag[..], &[0]].concat()).await,
            OnPublish::Return => {
                let mut returned = 312_u16.to_be_bytes().to_vec();
                returned.extend(short_text("NO_ROUTE"));
                returned.extend(short_text("exchange"));
                returned.extend(short_text("key"));
                self.method(channel, 60, 50, &returned).await;
                self.content(channel, b"x").await;
                self.method(channel, 60, 80, &[&tag[..], &[0]].concat()).await;
            }
            OnPublish::Block => {
                self.method(0, 10, 60, &short_text("low on memory")).await;
                self.method(channel, 60, 80, &[&tag[..], &[0]].concat()).await;
            }
            OnPublish::FallSilent => return false,
        }
        true
    }

    async fn consumed(&mut self, channel: u16) {
        let count = {
            let mut seen = self.seen.lock().unwrap();
            seen.consumed += 1;
            seen.consumed - 1
        };
        let tag = format!("c{count}");
        self.method(channel, 60, 21, &short_text(&tag)).await;
        match (self.script.consume)(count) {
            OnConsume::Nothing => {}
            OnConsume::Deliver => {
                let mut deliver = short_text(&tag);
                deliver.extend(1_u64.to_be_bytes());
                deliver.push(0);
                deliver.extend(short_text("exchange"));
                deliver.extend(short_text("ingest"));
                self.method(channel, 60, 60, &deliver).await;
                self.content(channel, b"hello").await;
            }
            OnConsume::Cancel => {
                let mut cancel = short_text(&tag);
                cancel.push(1);
                self.method(channel, 60, 30, &cancel).await;
            }
            OnConsume::CloseChannel => {
                let mut close = 406_u16.to_be_bytes().to_vec();
                close.extend(short_text("delivery acknowledgement timed out"));
                close.extend([0, 0, 0, 0]);
                self.method(channel, 20, 40, &close).await;
            }
        }
    }

    async fn content(&mut self, channel: u16, body: &[u8]) {
        let mut header = vec![0, 60, 0, 0];
        header.extend(u64::try_from(body.len()).unwrap().to_be_bytes());
        header.extend([0, 0]);
        self.write(2, channel, &header).await;
        self.write(3, channel, body).await;
    }

    async fn method(&mut self, channel: u16, class: u16, method: u16, rest: &[u8]) {
        let mut payload = class.to_be_bytes().to_vec();
        payload.extend(method.to_be_bytes());
        payload.extend(rest);
        self.write(1, channel, &payload).await;
    }

    async fn write(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        frame.extend(payload);
        frame.push(0xCE);
        // The other side may have left.
        let _ = self.stream.write_all(&frame).await;
    }

    async fn frame(&mut self) -> Option<(u8, u16, Vec<u8>)> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
        let mut payload = vec![0; usize::try_from(length).unwrap() + 1];
        self.stream.read_exact(&mut payload).await.ok()?;
        assert_eq!(payload.pop(), Some(0xCE));
        Some((head[0], u16::from_be_bytes([head[1], head[2]]), payload))
    }
}
