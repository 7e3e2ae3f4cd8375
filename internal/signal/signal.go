// Package signal wakes a goroutine up: at once, or when it waits next. Any number
// of wakes before that are one.
package signal

import "sync"

// Signal wakes one goroutine. The zero value is ready; any goroutines may use it at
// the same time.
type Signal struct {
	once sync.Once
	c    chan struct{}
}

// C returns the channel that the goroutine is to receive from.
func (s *Signal) C() <-chan struct{} { return s.channel() }

func (s *Signal) channel() chan struct{} {
	s.once.Do(func() { s.c = make(chan struct{}, 1) })
	return s.c
}

// Wake wakes it.
func (s *Signal) Wake() {
	select {
	case s.channel() <- struct{}{}:
	default: // it has not taken the last one yet
	}
}
